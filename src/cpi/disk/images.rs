//! Images of disks: made, filled, opened in QEMU for a job.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Instant;

use super::encryption;
use crate::cid::DiskCid;
use crate::cpi::context::Context;
use crate::crash;
use crate::error::{Error, ErrorKind, Result};
use crate::image::NewImage;
use crate::image::qemu_img::{ExistingImage, QemuImg};
use crate::qemu::{FileSpec, blockdev};
use crate::qmp::hotplug::HotplugError;
use crate::qmp::monitor::Monitor;
use crate::store::record::DiskImage;
use crate::store::{DiskKey, beneath};
use crate::supervisor::open_file;
use crate::units::Bytes;

/// Makes the empty `image` in `dir`. It is durable when this returns.
pub(super) fn create(
    cx: &Context,
    dir: &Path,
    image: &DiskImage,
    size: Bytes,
    deadline: Instant,
) -> Result<()> {
    let key = DiskKey::from_config(&cx.config);
    if image.encrypted {
        key.create_if_missing(&cx.store, deadline)?;
    }
    let new = NewImage {
        path: &dir.join(image.file_name()),
        format: image.format,
        size,
        preallocation: image.preallocation,
        key: image.encrypted.then(|| key.path()),
    };
    new.create(&QemuImg::new(&cx.config.qemu.img_binary), deadline)?.sync()?;
    beneath::sync_dir(dir)
}

/// Copies the data of the image `source` into the empty image `target`. No process may have either
/// open.
pub(super) fn fill(
    cx: &Context,
    from: &Path,
    source: &DiskImage,
    to: &Path,
    target: &DiskImage,
    deadline: Instant,
) -> Result<()> {
    let key = DiskKey::from_config(&cx.config);
    let existing = |path, image: &DiskImage| ExistingImage {
        path,
        format: image.format,
        key: image.encrypted.then(|| key.path()),
    };
    let qemu_img = QemuImg::new(&cx.config.qemu.img_binary);
    qemu_img.convert_into(&existing(from, source), &existing(to, target), deadline)?;
    crash::point!("image converted");
    Ok(())
}

/// Has QEMU open the image `spec`, for a job to write it.
pub(super) fn open_in_qemu(
    cx: &Context,
    monitor: &mut Monitor,
    spec: &FileSpec,
    disk: &DiskCid,
) -> Result<()> {
    let (opened, file) = open_file(&cx.config, spec.clone())?;
    let open = |monitor: &mut Monitor| -> Result<(), HotplugError> {
        let set = monitor.add_fd(file.as_fd(), &blockdev::opaque(&spec.node, spec.writable))?;
        for node in blockdev::nodes(&opened, set) {
            monitor.raw("blockdev-add", &node)?;
        }
        Ok(())
    };
    if spec.encrypted { encryption::with_key(cx, monitor, disk, open) } else { Ok(open(monitor)?) }
}

/// Adds a hint to the error of a copy whose source changed: a VM that was off was started.
pub(super) fn explain_started(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Conflict => {
            error.hint("its VM was started meanwhile: repeat the call, and QEMU makes the copy")
        }
        _ => error,
    }
}
