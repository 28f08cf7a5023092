//! The files that a VM's QEMU uses, and how each is opened.

use std::path::PathBuf;

use crate::cid::Cid;
use crate::error::Result;
use crate::store::beneath::Expected;
use crate::store::layout::{EPHEMERAL_IMAGE, ROOT_IMAGE};
use crate::store::record::{Accel, Cache, Discard, DiskRecord, Format, VmRecord};
use crate::store::{Store, VmPaths};

/// QEMU's id of the root disk: of its node and of its device.
pub const ROOT: &str = "root";
/// Id of the stemcell image, the root disk's backing file.
pub const BASE: &str = "base";
/// Id of the ephemeral disk.
pub const EPHEMERAL: &str = "ephemeral";
/// Id of the config drive.
pub const CONFIG_DRIVE: &str = "config";
/// Id of `/dev/kvm`.
pub const KVM: &str = "kvm";

/// A file to open for QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSpec {
    /// QEMU's id of the device that uses the file.
    pub id: String,
    /// QEMU's name of the image's block node: at most 26 characters, a letter first. It equals
    /// `id`, except for a disk whose image was replaced by a copy.
    pub node: String,
    /// Its path.
    pub path: PathBuf,
    /// Format of the image; `None` if it is not an image.
    pub format: Option<Format>,
    /// Which file is at the path.
    pub expected: Expected,
    /// Whether QEMU may write it.
    pub writable: bool,
    /// Cache mode. A read-only file stays in the host's page cache: all VMs share the stemcell
    /// image.
    pub cache: Cache,
    /// Whether blocks that the guest discards are freed.
    pub discard: Discard,
    /// Whether it is encrypted.
    pub encrypted: bool,
}

impl FileSpec {
    fn file(id: &str, path: PathBuf, writable: bool) -> Self {
        let (cache, discard) =
            (if writable { Cache::None } else { Cache::Writeback }, Discard::Unmap);
        let (id, node) = (id.to_owned(), id.to_owned());
        let expected = Expected::Own;
        Self { id, node, path, format: None, expected, writable, cache, discard, encrypted: false }
    }

    /// An image of a VM's own, with the default cache and discard modes.
    pub fn image(id: &str, path: PathBuf, format: Format, writable: bool) -> Self {
        Self { format: Some(format), ..Self::file(id, path, writable) }
    }

    /// The image of a persistent disk.
    ///
    /// # Errors
    /// [`Conflict`](crate::error::ErrorKind::Conflict) if another host owns the disk.
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

/// A file as opened for QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenedFile {
    /// The file's specification.
    pub spec: FileSpec,
    /// Whether the file was opened with O_DIRECT.
    pub direct: bool,
    /// Whether QEMU can use io_uring on this host.
    pub io_uring: bool,
}

/// The files that `vm` starts with. `disks` are the records of its attached disks.
pub fn required(
    vm: &VmRecord,
    paths: &VmPaths,
    store: &Store,
    disks: &[DiskRecord],
) -> Result<Vec<FileSpec>> {
    let mut files = Vec::new();
    if vm.machine.accel == Accel::Kvm {
        files.push(FileSpec::file(KVM, "/dev/kvm".into(), true));
    }
    let images = store.images_dir(&vm.cid, vm.pool.as_deref())?;
    let base = FileSpec::image(BASE, store.base_image(vm)?, vm.base.format, false);
    files.push(FileSpec { expected: store.base_expected(vm), ..base });
    files.push(FileSpec::image(ROOT, images.join(ROOT_IMAGE), Format::Qcow2, true));
    if vm.ephemeral.is_some() {
        files.push(FileSpec::image(EPHEMERAL, images.join(EPHEMERAL_IMAGE), Format::Qcow2, true));
    }
    files.push(FileSpec::image(CONFIG_DRIVE, paths.config_drive(), Format::Raw, false));
    files.extend(disks.iter().map(|disk| FileSpec::disk(store, disk)).collect::<Result<Vec<_>>>()?);
    Ok(files)
}
