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
//!                     untold                      as long as nobody may have been told of it: of others, too
//!   disks/<cid>/      disk.json  disk.qcow2  metadata.json
//!   snaps/<cid>/      snap.json  disk.qcow2         of snapshots
//!   host-id                                       which host this is to others: see [`super::ownership`]
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
//!   called-off/<cid>                              a create that a caller elsewhere wants no more: see `cpi::called_off`
//!   vms/<cid>/        qmp.sock  supervisor-qmp.sock  serial.sock  qemu.pid  supervisor.pid
//! ```
//!
//! A VM links its stemcell's image instead of naming it. So a stemcell can be deleted at any time, and the image
//! goes when the last VM on it does: the kernel counts the references, and they can not be wrong after a crash.
//! Stemcells of one file are links to one image for the same reason. Images may be in a [pool](super::pool) instead.

use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

use super::atomic;
use super::pool::Pools;
use super::record::{DiskImage, DiskRecord, SnapshotRecord, VmRecord};
use super::vm_paths::VmPaths;
use crate::cid::{Cid, DiskCid, StemcellCid, VmCid};
use crate::config::Config;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::host::mounts;

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

/// What to do who is somebody else.
const ROOTS: &str = "do it as root: the state directory is root's alone";

impl Store {
    /// The store at these places, without pools; nothing is read or made yet.
    pub fn new(state_dir: &Path, run_dir: &Path) -> Self {
        Self {
            state_dir: state_dir.to_owned(),
            run_dir: run_dir.to_owned(),
            pools: Pools::default(),
        }
    }

    /// The store where `config` says, with its pools.
    pub fn from_config(config: &Config) -> Self {
        let pools = Pools::new(&config.state_dir, config.pools.clone());
        Self { pools, ..Self::new(&config.state_dir, &config.run_dir) }
    }

    /// Makes what a mutating call needs.
    ///
    /// # Errors
    /// As [`Self::is_initialized`] and [`Self::bind_run_dir`].
    pub fn prepare(&self) -> Result<()> {
        let is_new = !self.is_initialized()?;
        // Also of an old one: backups may leave out what is empty.
        for name in ["stemcells", "vms", "disks", "snaps", "locks", "pending", "uids"] {
            let made = atomic::make_dir(&self.state_dir.join(name));
            made.map_err(|error| if geteuid().is_root() { error } else { error.hint(ROOTS) })?;
        }
        if is_new {
            atomic::write(&self.schema_file(), format!("{SCHEMA}\n").as_bytes())?;
        }
        self.bind_run_dir()
    }

    /// Whether the state directory is one of this version; `false` if it is none yet.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if a newer version of this program wrote it, or nobody can tell.
    pub fn is_initialized(&self) -> Result<bool> {
        let path = self.schema_file();
        let damaged = format!(
            "somebody damaged the file: if no newer version was here, write {SCHEMA} into it"
        );
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error)
                if error.kind() == std::io::ErrorKind::NotFound && !atomic::is_symlink(&path) =>
            {
                return self.ensure_mounted().map(|()| false);
            }
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                return Err(Error::io("read", &path, error).hint(ROOTS));
            }
            Err(error) => {
                return Err(Error::io("read", &path, error)
                    .with_kind(ErrorKind::Corrupt)
                    .hint(damaged));
            }
        };
        let text = String::from_utf8_lossy(&text);
        if text.trim() == SCHEMA.to_string() {
            return Ok(true);
        }
        let found: String = text.trim().chars().take(20).collect();
        let hint = match found.parse::<u32>() {
            Ok(_) => "a newer bosh-qemu-cpi wrote this directory: use that one".to_owned(),
            Err(_) => damaged,
        };
        let message =
            format!("'{}' says {found:?}; this version understands {SCHEMA}", path.display());
        Err(Error::new(ErrorKind::Corrupt, message).hint(hint))
    }

    /// Whether "there is no such thing" is the truth, and not that of a state directory whose filesystem is not mounted.
    ///
    /// # Errors
    /// [`ErrorKind::Host`] if fstab(5) names a filesystem for it that is not there, or if nobody can tell.
    pub fn ensure_mounted(&self) -> Result<()> {
        let schema = self.schema_file();
        let is_used = match schema.symlink_metadata() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
            looked => looked.at("look at", &schema).map(|_| true)?,
        };
        // One that is in use may be so on purpose although another could be mounted over it.
        let missing = mounts::missing(&self.state_dir, !is_used);
        let Some(point) = missing.at("look for the filesystem of", &self.state_dir)? else {
            return Ok(());
        };
        let message =
            format!("'{}' is not mounted, and the state directory is on it", point.display());
        Err(Error::new(ErrorKind::Host, message)
            .hint(format!("`mount {}`, and repeat the call", point.display())))
    }

    /// Whether anything in the state directory can be changed.
    ///
    /// # Errors
    /// Why not: its filesystem is read-only.
    pub fn ensure_writable(&self) -> Result<()> {
        rustix::fs::access(&self.state_dir, rustix::fs::Access::WRITE_OK)
            .map_err(std::io::Error::from)
            .at("change what is in", &self.state_dir)
    }

    /// What says of which version the state directory is.
    pub fn schema_file(&self) -> PathBuf {
        self.state_dir.join("schema")
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
        Ok(self
            .images_dir(&snapshot.cid, snapshot.disk.pool.as_deref())?
            .join(snapshot.image().file_name()))
    }

    /// The image below a VM's root disk.
    pub fn base_image(&self, vm: &VmRecord) -> Result<PathBuf> {
        if vm.base.path.is_absolute() {
            return Ok(vm.base.path.clone());
        }
        Ok(self.images_dir(&vm.cid, vm.base.pool.as_deref())?.join(&vm.base.path))
    }

    pub(super) fn dir_of(&self, prefix: &str, cid: &impl Cid) -> PathBuf {
        self.state_dir.join(format!("{prefix}s")).join(cid)
    }

    /// The VMs that have a run directory, running or not.
    pub fn list_running(&self) -> Result<Vec<VmCid>> {
        let names = atomic::names(&self.run_dir.join("vms"))?;
        Ok(names.iter().filter_map(|name| VmCid::parse(name).ok()).collect())
    }

    /// Files that [`atomic::write`] began. A power cut leaves them; one that is being written now is among them, too.
    pub fn temporary_files(&self) -> Result<Vec<PathBuf>> {
        let mut dirs =
            vec![self.state_dir.clone(), self.run_dir.clone(), self.state_dir.join("networks")];
        for kind in ["stemcells", "vms", "disks", "snaps", "networks"] {
            let kind = self.state_dir.join(kind);
            dirs.extend(atomic::names(&kind)?.into_iter().map(|name| kind.join(name)));
        }
        let mut files = Vec::new();
        for dir in dirs.iter().filter(|dir| dir.is_dir()) {
            files.extend(
                atomic::names(dir)?
                    .into_iter()
                    .filter(|name| name.starts_with(atomic::NEW))
                    .map(|name| dir.join(name)),
            );
        }
        Ok(files)
    }
}
