//! Copying a disk into another image: of another format, in another pool, encrypted or not. QEMU
//! copies while a VM uses the disk, `qemu-img` copies otherwise.
//!
//! A disk's record names the current image and at most one other, the inactive image. Exactly one
//! write of the record, the switch ([`DiskRecord::switch_image`]), makes the copy the current
//! image. Before it the copy is the inactive image, after it the old image is.
//!
//! ```text
//!   current    inactive     state                                  killed here, the next call …
//!   old        –
//!   old        new          the record names the copy              removes the copy
//!   old        new          the image is made, data is copied      ends the job, removes the copy
//!   old        new          ready; pending: I/O waits, the same    ends the job, removes the copy
//!                           data is in both images, durable
//!   new        old          the switch                             finalizes, removes the old
//!   new        old          finalized: QEMU uses the new image     removes the old
//!   new        –
//! ```
//!
//! The copy has a pending note, so that the next create settles it, too: a guest whose I/O waits
//! must not wait for a call on this very disk.
//!
//! A VM that is off may be started while its disk is copied, and then uses the old image. The copy
//! finds that out when it has taken the VM's lock again, and fails.
//!
//! While QEMU runs, its answer decides: nodes are named after images, and the image that the device
//! is on becomes the current one, whatever the record says. The VM's lock is held from `pending` to
//! the end, so that no QEMU starts on one image while the record comes to name the other.

use std::time::Instant;

use qapi::qmp;
use serde_json::json;

use super::access::{self, Access};
use super::attachment::{clean_up_deadline, hot_disk, hot_image};
use super::{images, progress};
use crate::cid::{DiskCid, VmCid};
use crate::cpi::capacity::{self, need};
use crate::cpi::context::Context;
use crate::cpi::creation::pending;
use crate::cpi::machine;
use crate::error::{Error, ErrorKind, Result};
use crate::qemu::FileSpec;
use crate::qmp::error::MonitorError;
use crate::qmp::hotplug;
use crate::qmp::job;
use crate::qmp::monitor::Monitor;
use crate::qmp::query::QueryBlock;
use crate::store::record::{Discard, Format};
use crate::store::{DiskKey, DiskRecord, VmRecord, atomic, beneath};
use crate::units::{Bytes, MiB};
use crate::{crash, image};

/// The name of the mirror job, after the disk's.
const JOB: &str = "copy";

/// Ensures that the disk can become `next` with this size, as far as that is known before the copy.
pub(super) fn ensure_possible(
    cx: &Context,
    disk: &DiskRecord,
    next: &DiskRecord,
    size: MiB,
    deadline: Instant,
) -> Result<()> {
    if let Some(left) = &disk.inactive_image {
        let path = cx.store.disk_image_at(&disk.cid, left)?;
        return Err(Error::new(ErrorKind::Host, format!("cannot remove '{}'", path.display()))
            .hint("an earlier copy left this image; the log of this call says why it stays"));
    }
    if next.encrypted {
        DiskKey::from_config(&cx.config).create_if_missing(&cx.store, deadline)?;
    }
    let need = space_needed(cx, disk, next, size)?;
    capacity::admit(cx, next.pool.as_deref(), need, deadline, || Ok(()))
}

/// Copies the disk into the image of `next`, which becomes its record. A copy that fails leaves
/// nothing, and the disk as it was. The caller holds the disk's lock and has called
/// [`ensure_possible`].
pub(super) fn run(
    cx: &Context,
    disk: &mut DiskRecord,
    next: &DiskRecord,
    deadline: Instant,
) -> Result<()> {
    let image = next.current();
    let mut access = access::access(cx, disk, deadline)?;
    let size = access::virtual_size(cx, disk, &mut access)?;
    let named = DiskRecord { inactive_image: Some(image.clone()), ..disk.clone() };
    let need = space_needed(cx, disk, next, disk.size)?;
    pending::add(cx, &disk.cid)?;
    capacity::admit(cx, image.pool.as_deref(), need, deadline, || cx.store.write(&named))
        .or_else(|error| pending::remove(cx, &disk.cid).and(Err(error)))?;
    *disk = named;
    let dir = cx.store.make_images_dir(&disk.cid, image.pool.as_deref());
    let copied =
        dir.and_then(|dir| images::create(cx, &dir, &image, size, deadline)).and_then(|()| {
            match access {
                Access { vm: Some(vm), monitor: Some(monitor), vm_lock } => {
                    start_mirror(cx, monitor, disk, next)?;
                    // Other calls may use the VM meanwhile, but not the disk.
                    drop(vm_lock);
                    switch_live(cx, disk, next, &vm, deadline)
                        .map_err(|error| machine::explain_exit(cx, &vm.cid, error))
                }
                access => copy_offline(cx, disk, next, access, deadline),
            }
        });
    // Removes the old image after a copy that worked, and the new one after a copy that failed.
    let settled = settle(cx, disk, clean_up_deadline(deadline));
    copied.and(settled)
}

fn copy_offline(
    cx: &Context,
    disk: &mut DiskRecord,
    next: &DiskRecord,
    access: Access,
    deadline: Instant,
) -> Result<()> {
    let (from, to) = (cx.store.disk_image(disk)?, cx.store.disk_image(next)?);
    let source = image::CopySource::open(&from)?;
    // A VM that is off may be started meanwhile, on the old image.
    drop(access);
    let filled = images::fill(cx, &from, &disk.current(), &to, &next.current(), deadline);
    // A copy of an image that changes is worthless, and so is the error of one.
    source.ensure_unchanged().map_err(images::explain_started)?;
    filled.and_then(|()| image::sync(&to))?;
    // No QEMU starts before the switch is done.
    let access = access::access(cx, disk, deadline)?;
    if let Access { vm: Some(vm), monitor: Some(_), .. } = &access {
        let message = format!("VM '{}' was started while the disk was copied", vm.cid);
        return Err(images::explain_started(Error::new(ErrorKind::Conflict, message)));
    }
    source.ensure_unchanged().map_err(images::explain_started)?;
    switch(cx, disk, next)
}

/// Makes the copy the current image, in one write.
fn switch(cx: &Context, disk: &mut DiskRecord, next: &DiskRecord) -> Result<()> {
    let switched = DiskRecord { inactive_image: Some(disk.current()), ..next.clone() };
    cx.store.write(&switched)?;
    *disk = switched;
    Ok(())
}

fn start_mirror(
    cx: &Context,
    mut monitor: Monitor,
    disk: &DiskRecord,
    next: &DiskRecord,
) -> Result<()> {
    let spec = FileSpec::disk(&cx.store, next)?;
    images::open_in_qemu(cx, &mut monitor, &spec, &disk.cid)?;
    let hot = hot_disk(disk);
    let mirror = json!({
        "job-id": hot.job(JOB), "device": hot.node, "target": spec.node, "sync": "full",
        "auto-finalize": false, "auto-dismiss": false,
    });
    monitor.raw("blockdev-mirror", &mirror)?;
    Ok(())
}

/// Waits until both images have the same data, and switches.
fn switch_live(
    cx: &Context,
    disk: &mut DiskRecord,
    next: &DiskRecord,
    vm: &VmRecord,
    deadline: Instant,
) -> Result<()> {
    let job = hot_disk(disk).job(JOB);
    // The job is queried once more at the deadline.
    let connect = || Monitor::connect(&cx.store.vm(&vm.cid).qmp(), clean_up_deadline(deadline));
    drop(job::wait_in_turns(
        &connect,
        &job,
        "ready",
        deadline,
        &mut progress::log(format!("copy of disk {}", disk.cid)),
    )?);
    // Flushes most of the data now: while the job is pending, the guest's I/O waits for the rest.
    image::sync(&cx.store.disk_image(next)?)?;
    let (_lock, _) = machine::lock(cx, &vm.cid, deadline)?;
    let mut monitor = connect()?;
    monitor.execute(&qmp::job_complete { id: job.clone() })?;
    job::wait(&mut monitor, &job, "pending", deadline)?;
    // QEMU has flushed its data; this flushes the file's length and allocation.
    image::sync(&cx.store.disk_image(next)?)?;
    switch(cx, disk, next)?;
    monitor.execute(&qmp::job_finalize { id: job.clone() })?;
    job::wait(&mut monitor, &job, "concluded", clean_up_deadline(deadline))?;
    Ok(job::dismiss(&mut monitor, &job)?)
}

/// Finishes or undoes an interrupted copy of the disk, whose lock the caller holds. An image that
/// cannot be removed, in a pool that is not mounted, stays the inactive image for the next call.
pub(super) fn settle(cx: &Context, disk: &mut DiskRecord, deadline: Instant) -> Result<()> {
    if disk.inactive_image.is_none() {
        return Ok(());
    }
    cx.store.ensure_owned(disk)?;
    if let Some(vm) = disk.vm.clone() {
        settle_in_qemu(cx, disk, &vm, deadline)
            .map_err(|e| e.during(format!("settle an earlier copy of disk '{}'", disk.cid)))?;
    }
    let left = disk.inactive_image.as_ref().expect("checked above");
    let removed = cx.store.disk_image_at(&disk.cid, left).and_then(|path| {
        beneath::remove_file(&path)?;
        crash::point!("old image removed");
        if left.pool.is_some() && left.pool != disk.pool {
            let dir = cx.store.images_dir(&disk.cid, left.pool.as_deref())?;
            atomic::remove_dir(&dir)?;
        }
        Ok(())
    });
    if let Err(error) = removed {
        let error = error.report();
        tracing::warn!(disk = %disk.cid, error, "cannot remove an unused image yet");
        return cx.store.write_owner_file(disk).and_then(|()| pending::remove(cx, &disk.cid));
    }
    disk.inactive_image = None;
    cx.store.write_disk(disk)?;
    pending::remove(cx, &disk.cid)
}

/// Ends the job of an interrupted copy, makes the image that the device is on the current one, and
/// closes the other.
fn settle_in_qemu(
    cx: &Context,
    disk: &mut DiskRecord,
    vm: &VmCid,
    deadline: Instant,
) -> Result<()> {
    let Some((_lock, mut monitor)) = machine::lock_running(cx, vm, deadline)? else {
        return Ok(());
    };
    let left = disk.inactive_image.clone().expect("the caller checks");
    let hot = hot_image(&disk.cid, &left.node(&disk.cid));
    let job = hot.job(JOB);
    let is_switched = disk.generation == left.generation.wrapping_add(1);
    if is_switched && job::find(&mut monitor, &job)?.is_some_and(|job| job.status == "pending") {
        monitor.execute(&qmp::job_finalize { id: job.clone() })?;
        job::wait(&mut monitor, &job, "concluded", deadline)?;
    }
    job::cancel_all(&mut monitor, |id| id == job, deadline)?;
    if device_node(&mut monitor, &disk.cid)?.is_some_and(|node| node == hot.node) {
        disk.switch_image();
        cx.store.write(disk)?;
    }
    let left = disk.inactive_image.as_ref().expect("a switch keeps one");
    Ok(hotplug::remove_backend(
        &mut monitor,
        &hot_image(&disk.cid, &left.node(&disk.cid)),
        deadline,
    )?)
}

/// The space that the copy needs at once.
fn space_needed(cx: &Context, disk: &DiskRecord, next: &DiskRecord, size: MiB) -> Result<Bytes> {
    // A mirror writes zeros for the holes of its source. They take space in a raw file without
    // discard.
    let writes_zeros =
        disk.vm.is_some() && next.format == Format::Raw && next.discard == Discard::Ignore;
    let full = if writes_zeros { need::full(size) } else { Bytes(0) };
    Ok(full.max(need::copy(
        cx,
        &cx.store.disk_image(disk)?,
        &disk.current(),
        &next.current(),
        size,
    )?))
}

/// The node that the disk's device is on, if there is a device.
fn device_node(monitor: &mut Monitor, disk: &DiskCid) -> Result<Option<String>, MonitorError> {
    let path = format!("/machine/peripheral/{disk}/virtio-backend");
    let devices = monitor.execute(&QueryBlock {})?;
    let device = devices.into_iter().find(|device| device.qdev.as_deref() == Some(&path));
    Ok(device.and_then(|device| device.inserted?.node_name))
}
