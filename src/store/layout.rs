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
//!   disks/<cid>/      disk.json  disk.qcow2
//!   locks/<rank>.<name>                           the host's own, boot.<n> and memory.host, while they are held
//!   pending/<cid>                                 there while the object is being made
//!   uids/<uid>                                    symlink whose text is the VM's cid
//! <run_dir>/                                      emptied by a reboot; 0700
//!   probe.json  io-uring.json                     what the installed QEMU can do here
//!   vms/<cid>/        qmp.sock  supervisor-qmp.sock  serial.sock  qemu.pid  supervisor.pid
//! ```
//!
//! A VM links its stemcell's image instead of naming it. So a stemcell can be deleted at any time, and the image
//! goes when the last VM on it does: the kernel counts the references, and they can not be wrong after a crash.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::atomic;
use super::lock::{Guard, Rank};
use super::record::Record;
use crate::cid::{Cid, DiskCid, StemcellCid, VmCid};
use crate::crash;
use crate::error::{Error, ErrorKind, IoContext, Result};

/// Version of the layout and of every record in it.
pub const SCHEMA: u32 = 1;

/// The state directory and the run directory that goes with it.
#[derive(Debug, Clone)]
pub struct Store {
    state_dir: PathBuf,
    run_dir: PathBuf,
}

impl Store {
    /// The store at these places; nothing is read or made yet.
    pub fn new(state_dir: &Path, run_dir: &Path) -> Self {
        Self { state_dir: state_dir.to_owned(), run_dir: run_dir.to_owned() }
    }

    /// Makes what a mutating call needs.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if a newer version of this program wrote the directory.
    pub fn prepare(&self) -> Result<()> {
        let path = self.state_dir.join("schema");
        match std::fs::read_to_string(&path) {
            Ok(text) if text.trim() == SCHEMA.to_string() => return Ok(()),
            Ok(text) => {
                let found: String = text.trim().chars().take(20).collect();
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("'{}' says {found:?}; this version understands {SCHEMA}", path.display()),
                )
                .hint("a newer bosh-qemu-cpi wrote this directory: use that one"));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io("read", &path, error)),
        }
        for name in ["stemcells", "vms", "disks", "locks", "pending", "uids"] {
            atomic::make_dir(&self.state_dir.join(name))?;
        }
        atomic::write(&path, format!("{SCHEMA}\n").as_bytes())
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

    fn dir_of(&self, prefix: &str, cid: &impl Cid) -> PathBuf {
        self.state_dir.join(format!("{prefix}s")).join(cid)
    }

    fn record_path<R: Record>(&self, cid: &R::Cid) -> PathBuf {
        self.dir_of(R::Cid::PREFIX, cid).join(format!("{}.json", R::Cid::PREFIX))
    }

    /// Takes the lock of one object, waiting until `deadline`.
    pub fn lock(&self, rank: Rank, name: impl std::fmt::Display, deadline: Instant) -> Result<Guard> {
        Guard::acquire(self.lock_path(rank, name), rank, deadline)
    }

    /// Whether an object has a lock, taken or not: the last thing of it that a removal takes away.
    pub fn has_lock(&self, rank: Rank, name: impl std::fmt::Display) -> bool {
        self.lock_path(rank, name).exists()
    }

    fn lock_path(&self, rank: Rank, name: impl std::fmt::Display) -> PathBuf {
        self.state_dir.join("locks").join(format!("{}.{name}", rank.as_str()))
    }

    /// The record of `cid`, or `None` if there is none.
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
        let record: R = serde_json::from_slice(&text).map_err(|e| corrupt(e.to_string()))?;
        if record.schema() > SCHEMA {
            return Err(corrupt(format!("schema {} is newer than {SCHEMA}", record.schema())));
        }
        if record.cid() != cid {
            return Err(corrupt(format!("it is about '{}'", record.cid())));
        }
        Ok(Some(record))
    }

    /// Writes a record; its directory is made if need be. Durable when it returns.
    pub fn write<R: Record>(&self, record: &R) -> Result<()> {
        let path = self.record_path::<R>(record.cid());
        atomic::make_dir(path.parent().expect("a record is in a directory"))?;
        let mut text = serde_json::to_vec_pretty(record).expect("a record is plain data");
        text.push(b'\n');
        atomic::write(&path, &text)
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

    /// Removes the object's directory: everything else first, the record last, so that whoever is interrupted leaves a
    /// record that says what to finish.
    pub fn remove<R: Record>(&self, cid: &R::Cid) -> Result<()> {
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
        let dir = self.state_dir.join(format!("{}s", R::Cid::PREFIX));
        let entries = match dir.read_dir() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.at("list", &dir)?,
        };
        let mut cids = Vec::new();
        for entry in entries {
            let name = entry.at("list", &dir)?.file_name();
            cids.extend(name.to_str().and_then(|name| R::Cid::parse(name).ok()));
        }
        Ok(cids)
    }
}

/// Everything of a VM that has a path.
#[derive(Debug, Clone)]
pub struct VmPaths {
    /// What survives a reboot.
    pub dir: PathBuf,
    /// What does not.
    pub run: PathBuf,
}

macro_rules! paths {
    ($($(#[$doc:meta])* $name:ident = $root:ident / $file:literal;)*) => {
        impl VmPaths {$(
            $(#[$doc])*
            pub fn $name(&self) -> PathBuf {
                self.$root.join($file)
            }
        )*}
    };
}

paths! {
    /// Overlay the guest boots from.
    root = dir / "root.qcow2";
    /// Hard link to the stemcell's image, which the overlay is based on.
    base = dir / "base.raw";
    /// Ephemeral disk.
    ephemeral = dir / "ephemeral.qcow2";
    /// FAT image labelled `CONFIG-2` with the agent's settings. Holds secrets.
    config_drive = dir / "config.img";
    /// What the guest wrote to its serial port.
    console_log = dir / "console.log";
    /// What QEMU wrote to its standard error.
    qemu_log = dir / "qemu.log";
    /// What the supervisor did.
    supervisor_log = dir / "supervisor.log";
    /// QEMU's events and the supervisor's own, one JSON object a line.
    events = dir / "events.jsonl";
    /// How the last run ended.
    exit = dir / "exit.json";
    /// QEMU's monitor for calls.
    qmp = run / "qmp.sock";
    /// QEMU's monitor for the supervisor.
    supervisor_qmp = run / "supervisor-qmp.sock";
    /// The guest's serial port, served by QEMU to the supervisor.
    serial = run / "serial.sock";
    /// Locked by QEMU as long as it lives.
    qemu_pid = run / "qemu.pid";
    /// Locked by the supervisor as long as it lives.
    supervisor_pid = run / "supervisor.pid";
}
