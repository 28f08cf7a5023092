//! The files a VM's QEMU works on, and how each must be opened.

use std::path::PathBuf;

use crate::cid::Cid;
use crate::store::record::{Accel, DiskRecord, Format, VmRecord};
use crate::store::{Store, VmPaths};

/// QEMU's id of the root disk, its node and its device.
pub const ROOT: &str = "root";
/// The stemcell image below the root disk.
pub const BASE: &str = "base";
/// The ephemeral disk.
pub const EPHEMERAL: &str = "ephemeral";
/// The config drive.
pub const CONFIG_DRIVE: &str = "config";
/// `/dev/kvm`.
pub const KVM: &str = "kvm";

/// One file to open for QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileNeed {
    /// QEMU's id of what it is for: a node name, so at most 26 characters and a letter first.
    pub id: String,
    /// Where it is.
    pub path: PathBuf,
    /// Format of the image; `None` for a device.
    pub format: Option<Format>,
    /// Whether QEMU may write it.
    pub writable: bool,
    /// Whether to bypass the host's page cache where the filesystem can. The base is shared by all VMs and stays
    /// cached once.
    pub direct: bool,
}

impl FileNeed {
    fn image(id: &str, path: PathBuf, format: Format, writable: bool) -> Self {
        Self { id: id.to_owned(), path, format: Some(format), writable, direct: writable }
    }

    /// A persistent disk's image.
    pub fn disk(store: &Store, disk: &DiskRecord) -> Self {
        Self::image(disk.cid.as_str(), store.disk_dir(&disk.cid).join(disk.image()), disk.format, true)
    }
}

/// A file as it was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    /// What it is for.
    pub need: FileNeed,
    /// Whether the page cache is really bypassed.
    pub direct: bool,
    /// Whether QEMU can use io_uring on this host.
    pub io_uring: bool,
}

/// Every file `vm` starts with; `disks` are the records of its attachments.
pub fn needs(vm: &VmRecord, paths: &VmPaths, store: &Store, disks: &[DiskRecord]) -> Vec<FileNeed> {
    let mut needs = Vec::new();
    if vm.machine.accel == Accel::Kvm {
        needs.push(FileNeed { id: KVM.into(), path: "/dev/kvm".into(), format: None, writable: true, direct: false });
    }
    needs.push(FileNeed::image(BASE, paths.dir.join(&vm.base.path), vm.base.format, false));
    needs.push(FileNeed::image(ROOT, paths.root(), Format::Qcow2, true));
    if vm.ephemeral.is_some() {
        needs.push(FileNeed::image(EPHEMERAL, paths.ephemeral(), Format::Qcow2, true));
    }
    needs.push(FileNeed::image(CONFIG_DRIVE, paths.config_drive(), Format::Raw, false));
    needs.extend(disks.iter().map(|disk| FileNeed::disk(store, disk)));
    needs
}
