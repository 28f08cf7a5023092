//! The files a VM's QEMU works on, and how each must be opened.

use std::path::PathBuf;

use crate::cid::Cid;
use crate::error::Result;
use crate::store::layout::{EPHEMERAL_IMAGE, ROOT_IMAGE};
use crate::store::record::{Accel, Cache, Discard, DiskRecord, Format, VmRecord};
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
    /// QEMU's id of what it is for: the device's, too.
    pub id: String,
    /// QEMU's name of the image's node: at most 26 characters and a letter first. The same as `id`, but for a disk whose
    /// image was replaced by a copy.
    pub node: String,
    /// Where it is.
    pub path: PathBuf,
    /// Format of the image; `None` for a device.
    pub format: Option<Format>,
    /// Whether QEMU may write it.
    pub writable: bool,
    /// Who caches writes. What is only read stays in the host's page cache: the base is shared by all VMs.
    pub cache: Cache,
    /// What becomes of blocks the guest discards.
    pub discard: Discard,
    /// Whether it is encrypted.
    pub encrypted: bool,
}

impl FileNeed {
    fn file(id: &str, path: PathBuf, writable: bool) -> Self {
        let (cache, discard) =
            (if writable { Cache::None } else { Cache::Writeback }, Discard::Unmap);
        let (id, node) = (id.to_owned(), id.to_owned());
        Self { id, node, path, format: None, writable, cache, discard, encrypted: false }
    }

    /// An image of a VM's own, opened as those that nobody said anything about.
    pub fn image(id: &str, path: PathBuf, format: Format, writable: bool) -> Self {
        Self { format: Some(format), ..Self::file(id, path, writable) }
    }

    /// A persistent disk's image.
    ///
    /// # Errors
    /// [`Conflict`](crate::error::ErrorKind::Conflict) if the disk is another host's.
    pub fn disk(store: &Store, disk: &DiskRecord) -> Result<Self> {
        store.ensure_owned(disk)?;
        let image = Self::image(disk.cid.as_str(), store.disk_image(disk)?, disk.format, true);
        let node = disk.current().node(&disk.cid);
        Ok(Self {
            node,
            cache: disk.cache,
            discard: disk.discard,
            encrypted: disk.encrypted,
            ..image
        })
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
pub fn needs(
    vm: &VmRecord,
    paths: &VmPaths,
    store: &Store,
    disks: &[DiskRecord],
) -> Result<Vec<FileNeed>> {
    let mut needs = Vec::new();
    if vm.machine.accel == Accel::Kvm {
        needs.push(FileNeed::file(KVM, "/dev/kvm".into(), true));
    }
    let images = store.images_dir(&vm.cid, vm.pool.as_deref())?;
    needs.push(FileNeed::image(BASE, store.base_image(vm)?, vm.base.format, false));
    needs.push(FileNeed::image(ROOT, images.join(ROOT_IMAGE), Format::Qcow2, true));
    if vm.ephemeral.is_some() {
        needs.push(FileNeed::image(EPHEMERAL, images.join(EPHEMERAL_IMAGE), Format::Qcow2, true));
    }
    needs.push(FileNeed::image(CONFIG_DRIVE, paths.config_drive(), Format::Raw, false));
    needs.extend(disks.iter().map(|disk| FileNeed::disk(store, disk)).collect::<Result<Vec<_>>>()?);
    Ok(needs)
}
