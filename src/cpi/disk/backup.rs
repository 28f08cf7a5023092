//! QEMU's backup job, which fills a snapshot while a VM uses the disk, and the removal of a
//! snapshot that is not complete.

use std::time::Instant;

use serde_json::json;

use super::attachment::{clean_up_deadline, hot_disk};
use super::{images, progress};
use crate::cid::{Cid, SnapshotCid};
use crate::cpi::context::Context;
use crate::cpi::creation::pending;
use crate::cpi::machine;
use crate::error::Result;
use crate::qemu::{FileSpec, blockdev};
use crate::qmp::hotplug::{self, HotDisk};
use crate::qmp::job;
use crate::qmp::monitor::Monitor;
use crate::store::{Guard, Phase, Rank, SnapshotRecord, VmRecord};

/// Starts to copy the disk as it is now into the snapshot's image.
pub(super) fn start(cx: &Context, mut monitor: Monitor, snapshot: &SnapshotRecord) -> Result<()> {
    let disk = &snapshot.disk;
    let path = cx.store.snapshot_image(snapshot)?;
    let image = FileSpec::image(snapshot.cid.as_str(), path, snapshot.format, true);
    let spec = FileSpec { encrypted: disk.encrypted, ..image };
    images::open_in_qemu(cx, &mut monitor, &spec, &disk.cid)?;
    let backup = json!({
        "job-id": job_id(snapshot), "device": disk.current().node(&disk.cid), "target": spec.node,
        "sync": "full", "auto-dismiss": false,
    });
    monitor.raw("blockdev-backup", &backup)?;
    Ok(())
}

/// Waits for the copy and has QEMU close the image.
pub(super) fn finish(
    cx: &Context,
    snapshot: &SnapshotRecord,
    vm: &VmRecord,
    deadline: Instant,
) -> Result<()> {
    // The job is queried once more at the deadline.
    let connect = || Monitor::connect(&cx.store.vm(&vm.cid).qmp(), clean_up_deadline(deadline));
    let mut progress = progress::log(format!("snapshot of disk {}", snapshot.disk.cid));
    let mut monitor =
        job::wait_in_turns(&connect, &job_id(snapshot), "concluded", deadline, &mut progress)?;
    job::dismiss(&mut monitor, &job_id(snapshot))?;
    Ok(hotplug::remove_backend(&mut monitor, &target(snapshot), deadline)?)
}

/// Removes a snapshot that is not complete, and its lock and pending note.
pub(super) fn discard(
    cx: &Context,
    cid: &SnapshotCid,
    lock: Guard,
    deadline: Instant,
) -> Result<()> {
    if let Some(snapshot) = cx.store.find::<SnapshotRecord>(cid)? {
        end_job(cx, &snapshot, deadline)?;
    }
    cx.store.remove::<SnapshotRecord>(cid)?;
    lock.unlink()?;
    pending::remove(cx, cid)
}

/// Removes the snapshot of an interrupted snapshot_disk or delete_snapshot.
///
/// # Errors
/// [`ErrorKind::Timeout`](crate::error::ErrorKind::Timeout) if a call works on it.
pub(in crate::cpi) fn recover(cx: &Context, cid: &SnapshotCid, deadline: Instant) -> Result<()> {
    let lock = cx.store.lock(Rank::Snapshot, cid, Instant::now())?;
    match cx.store.find::<SnapshotRecord>(cid)? {
        Some(snapshot) if snapshot.phase == Phase::Ready => pending::remove(cx, cid),
        _ => {
            tracing::warn!(%cid, "removing a snapshot whose creation or deletion was interrupted");
            discard(cx, cid, lock, deadline)
        }
    }
}

/// Ends the job and closes the image, if the VM's QEMU has them.
fn end_job(cx: &Context, snapshot: &SnapshotRecord, deadline: Instant) -> Result<()> {
    let Some(vm) = &snapshot.disk.vm else { return Ok(()) };
    let Some((_lock, mut monitor)) = machine::lock_running(cx, vm, deadline)? else {
        return Ok(());
    };
    job::cancel_all(&mut monitor, |id| id == job_id(snapshot), deadline)?;
    Ok(hotplug::remove_backend(&mut monitor, &target(snapshot), deadline)?)
}

/// The id of the job: one of the disk's, so that a detach ends it, with the snapshot's cid in it.
fn job_id(snapshot: &SnapshotRecord) -> String {
    hot_disk(&snapshot.disk).job(snapshot.cid.as_str())
}

/// The names of the snapshot's nodes in QEMU. There is no device.
fn target(snapshot: &SnapshotRecord) -> HotDisk {
    let node = snapshot.cid.as_str();
    HotDisk {
        device: blockdev::file_node(node),
        node: node.to_owned(),
        lower_nodes: vec![blockdev::file_node(node)],
    }
}
