//! resize_disk: the image grows in place, whether or not the disk is attached.
//!
//! ```text
//!   record n      record n, grows to m      record n, grows to m      record m
//!   image  n  ──► image  n             ──►  image  m, durable    ──►  image  m
//!                 after a kill here others count m; the next call looks at the image
//! ```

use std::time::Instant;

use serde_json::json;

use super::access::{self, Access};
use super::settled;
use crate::cid::DiskCid;
use crate::cpi::capacity::{self, need};
use crate::cpi::context::Context;
use crate::crash;
use crate::error::{Error, ErrorKind, Result};
use crate::image;
use crate::store::DiskRecord;
use crate::units::{Bytes, MiB};

/// Makes the disk larger.
pub(in crate::cpi) fn resize(cx: &Context, cid: &DiskCid, size: MiB) -> Result<()> {
    let deadline = cx.deadline("resize_disk");
    let (_lock, mut disk) = settled::lock_unless_copied(cx, cid, deadline)?;
    grow(cx, &mut disk, size, deadline)
}

/// Grows the disk, whose lock the caller holds, to `size`. A disk of this size is left as it is.
///
/// # Errors
/// [`ErrorKind::NotSupported`] for a larger disk, before anything is changed.
pub(super) fn grow(
    cx: &Context,
    disk: &mut DiskRecord,
    size: MiB,
    deadline: Instant,
) -> Result<()> {
    let doing = format!("resize disk '{}' to {size}", disk.cid);
    let mut access = access::access(cx, disk, deadline)?;
    let current = access::virtual_size(cx, disk, &mut access)?;
    if current > size.bytes() {
        let message = format!("{doing}: it has {current}, and a disk cannot shrink");
        return Err(Error::new(ErrorKind::NotSupported, message)
            .hint("create a smaller disk and copy the data"));
    }
    if current < size.bytes() {
        admit_growth(cx, disk, current, size, deadline)?;
        crash::point!("growth noted");
        if let Err(error) = grow_image(cx, disk, &mut access, size.bytes()) {
            disk.resize_target = None;
            return cx.store.write(disk).and(Err(error.during(doing)));
        }
        crash::point!("image grown");
    }
    if (disk.size, disk.resize_target) != (size, None) {
        (disk.size, disk.resize_target) = (size, None);
        cx.store.write_disk(disk)?;
    }
    Ok(())
}

fn grow_image(cx: &Context, disk: &DiskRecord, access: &mut Access, size: Bytes) -> Result<()> {
    let path = cx.store.disk_image(disk)?;
    let Some(monitor) = &mut access.monitor else {
        return image::grow(&path, disk.format, disk.encrypted, size);
    };
    let node = disk.current().node(&disk.cid);
    monitor.raw("block_resize", &json!({"node-name": node, "size": size.get()}))?;
    // QEMU has set the file's length but not flushed it.
    image::sync_data(&path)
}

/// Records the size that the disk grows to, if its pool has room.
fn admit_growth(
    cx: &Context,
    disk: &mut DiskRecord,
    current: Bytes,
    size: MiB,
    deadline: Instant,
) -> Result<()> {
    // The growth that a killed call has recorded is counted already.
    let counted = current.max(disk.size_after_resize().bytes());
    let more = Bytes(size.bytes().get().saturating_sub(counted.get()));
    let growing = DiskRecord { resize_target: Some(size), ..disk.clone() };
    // Preallocation reserves space for a whole file only: the new part is thin.
    let need = need::thin(cx, more);
    capacity::admit(cx, disk.pool.as_deref(), need, deadline, || cx.store.write(&growing))?;
    *disk = growing;
    Ok(())
}
