//! The layout of the state directory and the run directory.
//!
//! ```text
//! <state_dir>/                                    survives a reboot; 0700
//!   schema                                        version of the layout
//!   stemcells/<cid>/  stemcell.json  image.raw
//!   vms/<cid>/        vm.json                     written by calls, under the VM's lock
//!                     base.raw                    hard link to the stemcell's image: see below
//!                     root.qcow2  ephemeral.qcow2  config.img
//!                     exit.json  events.jsonl  console.log  qemu.log  supervisor.log
//!                                                   written by the supervisor
//!                     untold                        marker until the caller has received the cid;
//!                                                   objects of other kinds have it, too
//!   disks/<cid>/      disk.json  disk.qcow2  metadata.json
//!   snaps/<cid>/      snap.json  disk.qcow2         of snapshots
//!   host-id                                       id of this host in owner files: see `ownership`
//!   disk.key                                      key of the encrypted disks
//!   pools/<name>                                  marker of a pool that was used: see `pool`
//!   networks/<bridge>.json                        a network that exists without VMs: see `pins`
//!   networks/<cid>/   network.json                a managed network
//!   locks/<rank>.<name>                           boot.<n> and memory.host: only while held
//!   pending/<cid>                                 marker while the object is being made
//!   claims/<address or port>                      symlink whose text is the VM's cid
//!   uids/<uid>                                    symlink whose text is the VM's cid
//! <run_dir>/                                      emptied by a reboot; 0700
//!   state                                         symlink to the state directory it goes with
//!   probe.json  io-uring.json                     what the installed QEMU can do here
//!   called-off/<cid>                              tombstone: a remote caller cancelled the create
//!   vms/<cid>/        qmp.sock  supervisor-qmp.sock  serial.sock  qemu.output
//!                     qemu.pid  supervisor.pid
//! ```
//!
//! A VM has a hard link to its stemcell's image. So a stemcell can be deleted at any time, and the
//! image exists until its last VM is deleted: the kernel counts the links, and the count is right
//! after a crash, too. Stemcells that were imported from one file are links to one image for the
//! same reason. Images may be in a [pool](super::pool) instead.

use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

use super::atomic;
use super::beneath::{self, Expected};
use super::pool::Pools;
use super::record::{DiskImage, DiskRecord, SnapshotRecord, VmRecord};
use super::vm_paths::VmPaths;
use crate::cid::{Cid, DiskCid, StemcellCid, VmCid};
use crate::config::Config;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::host::mounts;

/// Version of the layout and of every record in it.
pub const SCHEMA: u32 = 1;

/// The overlay that a VM boots from.
pub const ROOT_IMAGE: &str = "root.qcow2";
/// A VM's ephemeral disk.
pub const EPHEMERAL_IMAGE: &str = "ephemeral.qcow2";
/// A VM's hard link to its stemcell's image, the backing file of the overlay.
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

/// Hint for a user who may not read the state directory.
const NEEDS_ROOT: &str = "repeat the command as root: only root can read the state directory";

impl Store {
    /// The store in these directories, without pools. Reads and writes nothing.
    pub fn new(state_dir: &Path, run_dir: &Path) -> Self {
        Self {
            state_dir: state_dir.to_owned(),
            run_dir: run_dir.to_owned(),
            pools: Pools::default(),
        }
    }

    /// The store in the directories of `config`, with its pools.
    pub fn from_config(config: &Config) -> Self {
        let pools = Pools::new(&config.state_dir, config.pools.clone());
        Self { pools, ..Self::new(&config.state_dir, &config.run_dir) }
    }

    /// Makes the directories that a mutating call needs.
    ///
    /// # Errors
    /// As [`Self::is_initialized`] and [`Self::bind_run_dir`].
    pub fn prepare(&self) -> Result<()> {
        let is_new = !self.is_initialized()?;
        // In an existing state directory, too: a backup may leave out empty directories.
        for name in ["stemcells", "vms", "disks", "snaps", "locks", "pending", "uids"] {
            let made = atomic::make_dir(&self.state_dir.join(name));
            made.map_err(|error| if geteuid().is_root() { error } else { error.hint(NEEDS_ROOT) })?;
        }
        if is_new {
            atomic::write(&self.schema_file(), format!("{SCHEMA}\n").as_bytes())?;
        }
        self.bind_run_dir()
    }

    /// Whether the state directory exists with the layout of this version; `false` if it is not
    /// initialized.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if a newer version wrote it or its `schema` file is damaged. As
    /// [`Self::ensure_mounted`].
    pub fn is_initialized(&self) -> Result<bool> {
        let path = self.schema_file();
        let damaged = format!(
            "the file is damaged: if no newer version ran on this host, write {SCHEMA} into it"
        );
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error)
                if error.kind() == std::io::ErrorKind::NotFound && !atomic::is_symlink(&path) =>
            {
                return self.ensure_mounted().map(|()| false);
            }
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                return Err(Error::io("read", &path, error).hint(NEEDS_ROOT));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {
                let hint = format!("'{}' must be a directory", self.state_dir.display());
                return Err(Error::io("read", &path, error)
                    .with_kind(ErrorKind::BadConfig)
                    .hint(format!("correct 'state_dir' in the configuration: {hint}")));
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
            Ok(_) => "a newer bosh-qemu-cpi wrote this directory: use that version".to_owned(),
            Err(_) => damaged,
        };
        let message =
            format!("'{}' contains {found:?}; this version expects {SCHEMA}", path.display());
        Err(Error::new(ErrorKind::Corrupt, message).hint(hint))
    }

    /// Refuses a state directory whose filesystem is not mounted: there, every object would seem
    /// not to exist.
    ///
    /// # Errors
    /// [`ErrorKind::Host`] if fstab(5) names a filesystem for the directory that is not mounted, or
    /// is unreadable.
    pub fn ensure_mounted(&self) -> Result<()> {
        let schema = self.schema_file();
        let is_used = match schema.symlink_metadata() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
            found => found.at("stat", &schema).map(|_| true)?,
        };
        // A directory in use may be used on purpose, although another filesystem could be mounted
        // over it.
        let missing = mounts::missing(&self.state_dir, !is_used);
        let Some(point) = missing.at("find the filesystem of", &self.state_dir)? else {
            return Ok(());
        };
        let message =
            format!("'{}' is not mounted, and it holds the state directory", point.display());
        Err(Error::new(ErrorKind::Host, message)
            .hint(format!("run `mount {}`, then repeat the call", point.display())))
    }

    /// Refuses a state directory on a read-only filesystem.
    ///
    /// # Errors
    /// The error of access(2).
    pub fn ensure_writable(&self) -> Result<()> {
        rustix::fs::access(&self.state_dir, rustix::fs::Access::WRITE_OK)
            .map_err(std::io::Error::from)
            .at("write to", &self.state_dir)
    }

    /// The file with the version of the layout.
    pub fn schema_file(&self) -> PathBuf {
        self.state_dir.join("schema")
    }

    /// The state directory.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// The directory of markers of pending creates.
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

    /// The paths of a VM.
    pub fn vm(&self, cid: &VmCid) -> VmPaths {
        VmPaths { dir: self.dir_of(VmCid::PREFIX, cid), run: self.run_dir.join("vms").join(cid) }
    }

    /// The pools.
    pub fn pools(&self) -> &Pools {
        &self.pools
    }

    /// The directory of the images of `cid`: in `pool`, or beside its record.
    ///
    /// # Errors
    /// As [`Pools::dir`].
    pub fn images_dir<C: Cid>(&self, cid: &C, pool: Option<&str>) -> Result<PathBuf> {
        match pool {
            Some(pool) => Ok(self.pools.dir(pool)?.join(cid)),
            None => Ok(self.dir_of(C::PREFIX, cid)),
        }
    }

    /// As [`Self::images_dir`], and makes the directory if it is missing. The caller has written
    /// the record that names the pool.
    pub fn make_images_dir<C: Cid>(&self, cid: &C, pool: Option<&str>) -> Result<PathBuf> {
        let Some(pool) = pool else { return self.images_dir(cid, None) };
        let dir = self.pools.mark_used(pool)?.join(cid);
        beneath::make_dir(&dir).map_err(|e| e.during(format!("use pool '{pool}'")))?;
        Ok(dir)
    }

    /// A persistent disk's image.
    pub fn disk_image(&self, disk: &DiskRecord) -> Result<PathBuf> {
        self.disk_image_at(&disk.cid, &disk.current())
    }

    /// An image of a persistent disk, current or not.
    pub fn disk_image_at(&self, disk: &DiskCid, image: &DiskImage) -> Result<PathBuf> {
        Ok(self.images_dir(disk, image.pool.as_deref())?.join(image.file_name()))
    }

    /// A snapshot's image.
    pub fn snapshot_image(&self, snapshot: &SnapshotRecord) -> Result<PathBuf> {
        Ok(self
            .images_dir(&snapshot.cid, snapshot.disk.pool.as_deref())?
            .join(snapshot.image().file_name()))
    }

    /// The backing file of a VM's root disk.
    pub fn base_image(&self, vm: &VmRecord) -> Result<PathBuf> {
        if vm.base.path.is_absolute() {
            return Ok(vm.base.path.clone());
        }
        Ok(self.images_dir(&vm.cid, vm.base.pool.as_deref())?.join(&vm.base.path))
    }

    /// What is at the path of [`Self::base_image`].
    pub fn base_expected(&self, vm: &VmRecord) -> Expected {
        if vm.base.path.is_absolute() { Expected::OfOperator } else { Expected::Shared }
    }

    pub(super) fn dir_of(&self, prefix: &str, cid: &impl Cid) -> PathBuf {
        self.state_dir.join(format!("{prefix}s")).join(cid)
    }

    /// The VMs with a run directory, running or not.
    pub fn vms_with_run_dir(&self) -> Result<Vec<VmCid>> {
        let names = atomic::names(&self.run_dir.join("vms"))?;
        Ok(names.iter().filter_map(|name| VmCid::parse(name).ok()).collect())
    }

    /// Temporary files of [`atomic::write`]: those that a power cut left, and those of writes in
    /// progress.
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
