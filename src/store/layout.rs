//! Where everything is.
//!
//! ```text
//! <state_dir>/                                    survives a reboot; 0700
//!   schema                                        version of the layout
//!   stemcells/<cid>/  stemcell.json  image.raw
//!   vms/<cid>/        vm.json                     written by calls, under the VM's lock
//!                     base.raw                    hard link to the stemcell's image: see below
//!                     root.qcow2  ephemeral.qcow2  config.img
//!                     exit.json  events.jsonl  console.log  qemu.log  supervisor.log     written by the supervisor
//!                     untold                      as long as nobody may have been told of the VM
//!   disks/<cid>/      disk.json  disk.qcow2
//!   snaps/<cid>/      snap.json  disk.qcow2         of snapshots
//!   disk.key                                      what encrypted disks are encrypted with
//!   pools/<name>                                  there once the pool was used: see [`super::pool`]
//!   networks/<bridge>.json                       a network that stays without VMs
//!   networks/<cid>/   network.json                a managed network
//!   locks/<rank>.<name>                           the host's own, boot.<n> and memory.host, while they are held
//!   pending/<cid>                                 there while the object is being made
//!   claims/<address or port>                      symlink whose text is the VM's cid
//!   uids/<uid>                                    symlink whose text is the VM's cid
//! <run_dir>/                                      emptied by a reboot; 0700
//!   state                                         symlink to the state directory it goes with
//!   probe.json  io-uring.json                     what the installed QEMU can do here
//!   vms/<cid>/        qmp.sock  supervisor-qmp.sock  serial.sock  qemu.pid  supervisor.pid
//! ```
//!
//! A VM links its stemcell's image instead of naming it. So a stemcell can be deleted at any time, and the image
//! goes when the last VM on it does: the kernel counts the references, and they can not be wrong after a crash.
//! Stemcells of one file are links to one image for the same reason. Images may be in a [pool](super::pool) instead.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Deserialize;

use super::atomic::{self, Staged};
use super::lock::{Guard, Rank};
use super::pool::Pools;
use super::record::{DiskImage, DiskRecord, Record, SnapshotRecord, VmRecord};
use super::vm_paths::VmPaths;
use crate::cid::{Cid, DiskCid, SnapshotCid, StemcellCid, VmCid};
use crate::config::Config;
use crate::crash;
use crate::error::{Error, ErrorKind, IoContext, Result};

/// Version of the layout and of every record in it.
pub const SCHEMA: u32 = 1;

/// Overlay a VM boots from.
pub const ROOT_IMAGE: &str = "root.qcow2";
/// A VM's ephemeral disk.
pub const EPHEMERAL_IMAGE: &str = "ephemeral.qcow2";
/// A VM's hard link to its stemcell's image, which the overlay is based on.
pub const BASE_IMAGE: &str = "base.raw";
/// An imported stemcell's image.
pub const STEMCELL_IMAGE: &str = "image.raw";

/// The state directory and the run directory that goes with it.
#[derive(Debug, Clone)]
pub struct Store {
    state_dir: PathBuf,
    run_dir: PathBuf,
    pools: Pools,
}

impl Store {
    /// The store at these places, without pools; nothing is read or made yet.
    pub fn new(state_dir: &Path, run_dir: &Path) -> Self {
        Self { state_dir: state_dir.to_owned(), run_dir: run_dir.to_owned(), pools: Pools::default() }
    }

    /// The store where `config` says, with its pools.
    pub fn of(config: &Config) -> Self {
        let pools = Pools::new(&config.state_dir, config.pools.clone());
        Self { pools, ..Self::new(&config.state_dir, &config.run_dir) }
    }

    /// Makes what a mutating call needs.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if a newer version of this program wrote the directory.
    pub fn prepare(&self) -> Result<()> {
        let path = self.state_dir.join("schema");
        match std::fs::read_to_string(&path) {
            Ok(text) if text.trim() == SCHEMA.to_string() => return self.own_run_dir(),
            Ok(text) => {
                let found: String = text.trim().chars().take(20).collect();
                let hint = match found.parse::<u32>() {
                    Ok(_) => "a newer bosh-qemu-cpi wrote this directory: use that one".to_owned(),
                    Err(_) => {
                        format!("somebody damaged the file: if no newer version was here, write {SCHEMA} into it")
                    }
                };
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("'{}' says {found:?}; this version understands {SCHEMA}", path.display()),
                )
                .hint(hint));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io("read", &path, error)),
        }
        for name in ["stemcells", "vms", "disks", "snaps", "locks", "pending", "uids"] {
            atomic::make_dir(&self.state_dir.join(name))?;
        }
        atomic::write(&path, format!("{SCHEMA}\n").as_bytes())?;
        self.own_run_dir()
    }

    /// Makes sure that the run directory goes with this state directory and no other: what runs there is looked for in
    /// the records here.
    ///
    /// # Errors
    /// [`ErrorKind::BadConfig`] naming both.
    pub fn own_run_dir(&self) -> Result<()> {
        let link = self.run_dir.join("state");
        atomic::make_dir(&self.run_dir)?;
        match std::os::unix::fs::symlink(&self.state_dir, &link) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            made => return made.at("make", &link),
        }
        let owner = std::fs::read_link(&link).at("read", &link)?;
        let same = |a: &Path, b: &Path| a == b || (a.exists() && a.canonicalize().ok() == b.canonicalize().ok());
        if same(&owner, &self.state_dir) {
            return Ok(());
        }
        let (run_dir, owner, ours) = (self.run_dir.display(), owner.display(), self.state_dir.display());
        Err(Error::new(
            ErrorKind::BadConfig,
            format!("run_dir '{run_dir}' goes with state_dir '{owner}', not '{ours}'"),
        )
        .hint(format!("give each state_dir a run_dir of its own; if it was moved and no VM runs, remove '{run_dir}'")))
    }

    /// The state directory.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// Where creates note what they are making.
    pub fn pending_dir(&self) -> PathBuf {
        self.state_dir.join("pending")
    }

    /// The run directory.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// A stemcell's directory.
    pub fn stemcell_dir(&self, cid: &StemcellCid) -> PathBuf {
        self.dir_of(StemcellCid::PREFIX, cid)
    }

    /// A persistent disk's directory.
    pub fn disk_dir(&self, cid: &DiskCid) -> PathBuf {
        self.dir_of(DiskCid::PREFIX, cid)
    }

    /// Everything of a VM that has a path.
    pub fn vm(&self, cid: &VmCid) -> VmPaths {
        VmPaths { dir: self.dir_of(VmCid::PREFIX, cid), run: self.run_dir.join("vms").join(cid) }
    }

    /// The pools.
    pub fn pools(&self) -> &Pools {
        &self.pools
    }

    /// Where the images of `cid` are: in `pool`, or beside its record.
    ///
    /// # Errors
    /// As [`Pools::dir`].
    pub fn images_dir<C: Cid>(&self, cid: &C, pool: Option<&str>) -> Result<PathBuf> {
        match pool {
            Some(pool) => Ok(self.pools.dir(pool)?.join(cid)),
            None => Ok(self.dir_of(C::PREFIX, cid)),
        }
    }

    /// The same, made if need be. The record that names the pool must be written before.
    pub fn make_images_dir<C: Cid>(&self, cid: &C, pool: Option<&str>) -> Result<PathBuf> {
        let Some(pool) = pool else { return self.images_dir(cid, None) };
        let top = self.pools.claim(pool)?;
        let dir = top.join(cid);
        atomic::make_dir(&dir).map_err(|e| e.during(format!("use pool '{pool}'")))?;
        Ok(dir)
    }

    /// A persistent disk's image.
    pub fn disk_image(&self, disk: &DiskRecord) -> Result<PathBuf> {
        self.disk_image_at(&disk.cid, &disk.current())
    }

    /// An image of a persistent disk, in force or not.
    pub fn disk_image_at(&self, disk: &DiskCid, image: &DiskImage) -> Result<PathBuf> {
        Ok(self.images_dir(disk, image.pool.as_deref())?.join(image.file_name()))
    }

    /// A snapshot's image.
    pub fn snapshot_image(&self, snapshot: &SnapshotRecord) -> Result<PathBuf> {
        Ok(self.images_dir(&snapshot.cid, snapshot.disk.pool.as_deref())?.join(snapshot.image().file_name()))
    }

    /// The image below a VM's root disk.
    pub fn base_image(&self, vm: &VmRecord) -> Result<PathBuf> {
        if vm.base.path.is_absolute() {
            return Ok(vm.base.path.clone());
        }
        Ok(self.images_dir(&vm.cid, vm.base.pool.as_deref())?.join(&vm.base.path))
    }

    fn dir_of(&self, prefix: &str, cid: &impl Cid) -> PathBuf {
        self.state_dir.join(format!("{prefix}s")).join(cid)
    }

    /// The directory of an object's record.
    pub fn record_dir<R: Record>(&self, cid: &R::Cid) -> PathBuf {
        self.dir_of(R::Cid::KIND, cid)
    }

    fn record_path<R: Record>(&self, cid: &R::Cid) -> PathBuf {
        self.dir_of(R::Cid::KIND, cid).join(format!("{}.json", R::Cid::KIND))
    }

    /// Takes the lock of one object, waiting until `deadline`.
    pub fn lock(&self, rank: Rank, name: impl std::fmt::Display, deadline: Instant) -> Result<Guard> {
        Guard::acquire(self.lock_path(rank, name), rank, deadline)
    }

    /// Whether an object has a lock, taken or not: the last thing of it that a removal takes away.
    pub fn has_lock(&self, rank: Rank, name: impl std::fmt::Display) -> bool {
        self.lock_path(rank, name).exists()
    }

    /// What every lock file says it is for. Names that are no locks are somebody else's and left out.
    pub fn locks(&self) -> Result<Vec<(Rank, String)>> {
        let lock = |name: String| {
            let (rank, name) = name.split_once('.')?;
            Some((Rank::ALL.into_iter().find(|known| known.as_str() == rank)?, name.to_owned()))
        };
        Ok(names(&self.state_dir.join("locks"))?.into_iter().filter_map(lock).collect())
    }

    /// Whether there is something that the lock `name` is for. The others are for the moment only.
    pub fn is_locked_for_something(&self, rank: Rank, name: &str) -> bool {
        let prefix = match rank {
            Rank::Stemcell => StemcellCid::PREFIX,
            Rank::Disk => DiskCid::PREFIX,
            Rank::Vm => VmCid::PREFIX,
            Rank::Snapshot => SnapshotCid::PREFIX,
            Rank::Memory | Rank::Boot | Rank::Network | Rank::Space | Rank::Claims => return false,
        };
        atomic::is_there(&self.state_dir.join(format!("{prefix}s")).join(name))
    }

    /// The VMs that have a run directory, running or not.
    pub fn list_running(&self) -> Result<Vec<VmCid>> {
        let names = names(&self.run_dir.join("vms"))?;
        Ok(names.iter().filter_map(|name| VmCid::parse(name).ok()).collect())
    }

    /// Files that [`atomic::write`] began. A power cut leaves them; one that is being written now is among them, too.
    pub fn temporary_files(&self) -> Result<Vec<PathBuf>> {
        let mut dirs = vec![self.state_dir.clone(), self.run_dir.clone()];
        for kind in ["stemcells", "vms", "disks", "snaps"] {
            let kind = self.state_dir.join(kind);
            dirs.extend(names(&kind)?.into_iter().map(|name| kind.join(name)));
        }
        let mut files = Vec::new();
        for dir in dirs.iter().filter(|dir| dir.is_dir()) {
            files.extend(
                names(dir)?.into_iter().filter(|name| name.starts_with(atomic::NEW)).map(|name| dir.join(name)),
            );
        }
        Ok(files)
    }

    fn lock_path(&self, rank: Rank, name: impl std::fmt::Display) -> PathBuf {
        self.state_dir.join("locks").join(format!("{}.{name}", rank.as_str()))
    }

    /// The record of `cid`, or `None` if there is nothing of it.
    ///
    /// # Errors
    /// As [`Self::read`], and [`ErrorKind::Corrupt`] if there is something of it but no record: that was lost, because a
    /// record is written before anything else is made and removed after it.
    pub fn find<R: Record>(&self, cid: &R::Cid) -> Result<Option<R>> {
        let record = self.read::<R>(cid)?;
        if record.is_some() || !self.has_something::<R>(cid)? {
            return Ok(record);
        }
        // It may have been written between the two looks.
        self.read::<R>(cid)?.map(Some).ok_or_else(|| {
            let dir = self.record_dir::<R>(cid);
            Error::new(ErrorKind::Corrupt, format!("'{}' has no record", dir.display()))
                .hint("restore its record from a backup; or move it away, and all it stands for is gone")
        })
    }

    /// Whether there is anything of an object but a record that was being written. A link to nothing is something.
    fn has_something<R: Record>(&self, cid: &R::Cid) -> Result<bool> {
        let dir = self.record_dir::<R>(cid);
        if !atomic::is_there(&dir) {
            return Ok(false);
        }
        if !dir.is_dir() || names(&dir)?.iter().any(|name| !name.starts_with(atomic::NEW)) {
            return Ok(true);
        }
        for pool in self.pools.names() {
            if atomic::is_there(&self.pools.dir(pool)?.join(cid)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The records of one kind that can be read: one that can not must not keep others from working.
    pub fn readable<R: Record>(&self) -> Result<Vec<R>> {
        let read = |cid: R::Cid| {
            self.read::<R>(&cid).unwrap_or_else(|error| {
                tracing::warn!(%cid, error = error.report(), "left out");
                None
            })
        };
        Ok(self.list::<R>()?.into_iter().filter_map(read).collect())
    }

    /// What the file says that is the record of `cid`; `None` if there is no such file.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] naming the file if it can not be understood; nothing is guessed.
    pub fn read<R: Record>(&self, cid: &R::Cid) -> Result<Option<R>> {
        let path = self.record_path::<R>(cid);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("read", &path, error)),
        };
        let corrupt = |why: String| {
            Error::new(ErrorKind::Corrupt, format!("record '{}' can not be used: {why}", path.display()))
                .hint("restore the file from a backup; nothing beside it was touched")
        };
        // First: the rest of a newer one may look like anything.
        let Schema { schema } = serde_json::from_slice(&text).map_err(|e| corrupt(e.to_string()))?;
        if schema > SCHEMA {
            return Err(corrupt(format!("schema {schema} is newer than {SCHEMA}")));
        }
        let record: R = serde_json::from_slice(&text).map_err(|e| corrupt(e.to_string()))?;
        if record.cid() != cid {
            return Err(corrupt(format!("it is about '{}'", record.cid())));
        }
        Ok(Some(record))
    }

    /// Writes a record; its directory is made if need be. Durable when it returns.
    pub fn write<R: Record>(&self, record: &R) -> Result<()> {
        self.stage(record)?.commit()
    }

    /// Writes a record but for its taking effect, so that a step which can not be undone is not taken in vain.
    pub fn stage<R: Record>(&self, record: &R) -> Result<Staged> {
        let path = self.record_path::<R>(record.cid());
        atomic::make_dir(path.parent().expect("a record is in a directory"))?;
        let mut text = serde_json::to_vec_pretty(record).expect("a record is plain data");
        text.push(b'\n');
        atomic::stage(&path, &text)
    }

    /// Writes a record that says that its object is being removed. On a full filesystem the old one stays and the removal
    /// goes on: it is what makes room.
    pub fn write_deleting<R: Record>(&self, record: &R) -> Result<()> {
        match self.write(record) {
            Err(error) if error.kind() == ErrorKind::NoDiskSpace => {
                tracing::warn!(cid = %record.cid(), error = error.report(), "removing without a note of it");
                Ok(())
            }
            written => written,
        }
    }

    /// Removes the object's images from pools and its directory: everything else first, the record last, so that whoever is interrupted leaves a
    /// record that says what to finish.
    pub fn remove<R: Record>(&self, cid: &R::Cid) -> Result<()> {
        for pool in self.read::<R>(cid)?.iter().flat_map(Record::pools) {
            let pool = self.pools.dir(pool)?;
            atomic::remove_dir(&pool.join(cid))?;
            crash::point!("a {}'s images removed from a pool", R::Cid::PREFIX);
            atomic::sync_dir(pool)?;
        }
        let record = self.record_path::<R>(cid);
        let dir = record.parent().expect("a record is in a directory");
        let entries = match dir.read_dir() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            entries => entries.at("list", dir)?,
        };
        for entry in entries {
            let path = entry.at("list", dir)?.path();
            if path != record {
                atomic::remove_file(&path)?;
                crash::point!("a {}'s file removed", R::Cid::PREFIX);
            }
        }
        atomic::remove_file(&record)?;
        crash::point!("a {}'s record removed", R::Cid::PREFIX);
        atomic::remove_dir(dir)?;
        crash::point!("a {}'s directory removed", R::Cid::PREFIX);
        atomic::sync_dir(dir.parent().expect("an object's directory has a parent"))
    }

    /// The cids of all objects of one kind, in no order. Names that are no cids are somebody else's and left out.
    pub fn list<R: Record>(&self) -> Result<Vec<R::Cid>> {
        let names = names(&self.state_dir.join(format!("{}s", R::Cid::KIND)))?;
        // Beside managed networks are the files of pinned ones; no cid of ours has a dot.
        let names = names.iter().filter(|name| !name.ends_with(".json"));
        Ok(names.filter_map(|name| R::Cid::parse(name).ok()).collect())
    }
}

/// All that is read of a record that may be of a newer version.
#[derive(Deserialize)]
struct Schema {
    schema: u32,
}

/// The names in `dir` that are UTF-8, as all of ours are; none if it is not there.
fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match dir.read_dir() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.at("list", dir)?,
    };
    let names = entries.map(|entry| entry.map(|entry| entry.file_name().into_string().ok()));
    names.filter_map(Result::transpose).collect::<std::io::Result<_>>().at("list", dir)
}
