//! The lock of a disk. A copy of the disk holds it for hours, so a call that cannot have it says
//! what the copy is.

use std::time::Instant;

use crate::cid::{DiskCid, SnapshotCid};
use crate::cpi::context::Context;
use crate::cpi::creation::pending;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{DiskRecord, Guard, Rank, SnapshotRecord};

/// The record of a disk that is ready.
///
/// # Errors
/// [`ErrorKind::DiskNotFound`].
pub(super) fn find(cx: &Context, cid: &DiskCid) -> Result<DiskRecord> {
    cx.ready::<DiskRecord>(cid)?
        .ok_or_else(|| Error::new(ErrorKind::DiskNotFound, format!("there is no disk '{cid}'")))
}

/// Takes the lock of a disk, whether or not the disk exists.
///
/// # Errors
/// [`ErrorKind::Timeout`] naming the snapshot or the update that holds the lock, if one does.
pub(super) fn lock(cx: &Context, cid: &DiskCid, deadline: Instant) -> Result<Guard> {
    cx.store.lock(Rank::Disk, cid, deadline).map_err(|error| match error.kind() {
        ErrorKind::Timeout => match copy_in_progress(cx, cid) {
            Ok(Some(copy)) => error.during(copy).hint("repeat the call when that is done"),
            _ => error,
        },
        _ => error,
    })
}

/// Ensures that no copy of the disk is being made.
///
/// # Errors
/// [`ErrorKind::Conflict`] naming the snapshot or the update.
pub(super) fn ensure_not_copied(cx: &Context, cid: &DiskCid) -> Result<()> {
    match copy_in_progress(cx, cid)? {
        Some(copy) => {
            Err(Error::new(ErrorKind::Conflict, copy).hint("repeat the call when that is done"))
        }
        None => Ok(()),
    }
}

/// The snapshots of the disk that have a pending note, whether or not a call works on them.
pub(super) fn pending_snapshots(cx: &Context, disk: &DiskCid) -> Result<Vec<SnapshotCid>> {
    let mut pending = pending::list::<SnapshotRecord>(cx)?;
    // A snapshot whose record cannot be read may be of another disk: it does not block this one.
    pending.retain(|snapshot| {
        let record = cx.store.read::<SnapshotRecord>(snapshot).ok().flatten();
        record.is_some_and(|snapshot| snapshot.disk.cid == *disk)
    });
    Ok(pending)
}

/// The copy of the disk that a call is making, for a message.
fn copy_in_progress(cx: &Context, cid: &DiskCid) -> Result<Option<String>> {
    for snapshot in pending_snapshots(cx, cid)? {
        if cx.store.try_lock(Rank::Snapshot, &snapshot)?.is_none() {
            return Ok(Some(format!("disk '{cid}' is being copied into snapshot '{snapshot}'")));
        }
    }
    let is_updated =
        find(cx, cid)?.inactive_image.is_some() && cx.store.try_lock(Rank::Disk, cid)?.is_none();
    Ok(is_updated.then(|| format!("disk '{cid}' is being copied by update_disk")))
}
