//! How the image of a disk can be changed: through the monitor of the QEMU that has it open, or as
//! a file.

use std::time::{Duration, Instant};

use super::attachment;
use crate::cid::Cid;
use crate::cpi::context::Context;
use crate::cpi::machine;
use crate::error::Result;
use crate::image;
use crate::qmp::hotplug::{self, Inventory};
use crate::qmp::monitor::Monitor;
use crate::qmp::query::QueryNamedBlockNodes;
use crate::store::{DiskRecord, Guard, VmRecord};
use crate::units::Bytes;

/// How long a QEMU that has exited may still hold the lock of an image.
const IMAGE_CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// Which process has the image of a disk open. That cannot change while the locks of the disk and
/// the VM are held.
pub(super) struct Access {
    /// The VM that the disk is attached to, on or off.
    pub vm: Option<VmRecord>,
    /// The monitor of the QEMU that has the image open; `None` if no process has.
    pub monitor: Option<Monitor>,
    /// The VM's lock.
    pub vm_lock: Option<Guard>,
}

/// Finds out which QEMU has the image of `disk` open, and closes an image whose device the guest
/// has ejected. The caller holds the disk's lock.
pub(super) fn access(cx: &Context, disk: &DiskRecord, deadline: Instant) -> Result<Access> {
    let Some(holder) = attachment::settle(cx, disk, deadline)? else {
        ensure_closed(cx, disk)?;
        return Ok(Access { vm: None, monitor: None, vm_lock: None });
    };
    let (lock, vm) = machine::lock(cx, &holder, deadline)?;
    let mut monitor = machine::monitor(cx, &vm, deadline)?;
    if let Some(connected) = &mut monitor
        && !Inventory::query(connected)?.has_device(disk.cid.as_str())
    {
        // The guest has ejected the device by itself; QEMU may still have the image open.
        hotplug::remove_backend(connected, &attachment::hot_disk(disk), deadline)?;
        monitor = None;
    }
    if monitor.is_none() {
        ensure_closed(cx, disk)?;
    }
    Ok(Access { vm: Some(vm), monitor, vm_lock: Some(lock) })
}

/// Ensures that no QEMU has the image of `disk` open, whatever the records say: an operator may
/// have restored them from a backup.
///
/// # Errors
/// [`ErrorKind::Conflict`](crate::error::ErrorKind::Conflict) if one has.
pub(super) fn ensure_closed(cx: &Context, disk: &DiskRecord) -> Result<()> {
    image::wait_unlocked(&cx.store.disk_image(disk)?, Instant::now() + IMAGE_CLOSE_TIMEOUT)
}

/// The size of the disk as its guest sees it.
pub(super) fn virtual_size(cx: &Context, disk: &DiskRecord, access: &mut Access) -> Result<Bytes> {
    let node = disk.current().node(&disk.cid);
    if let Some(monitor) = &mut access.monitor
        && let Some(size) = node_size(monitor, &node)?
    {
        return Ok(size);
    }
    image::virtual_size(&cx.store.disk_image(disk)?, disk.format, disk.encrypted)
}

/// The size of a block node, if QEMU has it.
fn node_size(monitor: &mut Monitor, name: &str) -> Result<Option<Bytes>> {
    let nodes = monitor.execute(&QueryNamedBlockNodes { flat: true })?;
    let node = nodes.into_iter().find(|node| node.name == name);
    Ok(node.map(|node| Bytes(node.image.virtual_size)))
}
