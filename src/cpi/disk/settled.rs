//! A disk under its lock: owned by this host, and with every interrupted copy settled.

use std::time::Instant;

use super::{backup, copy, lock, ownership};
use crate::cid::DiskCid;
use crate::cpi::context::Context;
use crate::cpi::creation::acknowledgement;
use crate::error::Result;
use crate::store::{DiskRecord, Guard};

/// Takes the lock of a disk that is ready, and finishes or undoes an interrupted copy of it.
pub(crate) fn lock(cx: &Context, cid: &DiskCid, deadline: Instant) -> Result<(Guard, DiskRecord)> {
    loop {
        ownership::owned(cx, cid, deadline)?;
        let lock = lock::lock(cx, cid, deadline)?;
        match lock::find(cx, cid) {
            Ok(mut disk) => {
                acknowledgement::acknowledge::<DiskRecord>(cx, cid);
                cx.store.cancel_move(&disk)?;
                copy::settle(cx, &mut disk, deadline)?;
                return Ok((lock, disk));
            }
            Err(error) => {
                lock.unlink()?;
                cx.store.ensure_not_owned_elsewhere(cid)?;
                // This host gave it up while this call waited, and can take it again.
                if !cx.store.can_take(cid)? {
                    return Err(error);
                }
            }
        }
    }
}

/// The same, but removes incomplete snapshots of the disk first, and does not wait for a copy of
/// it: that may take hours.
///
/// # Errors
/// [`ErrorKind::Conflict`](crate::error::ErrorKind::Conflict) naming the snapshot or the update
/// that copies the disk.
pub(super) fn lock_unless_copied(
    cx: &Context,
    cid: &DiskCid,
    deadline: Instant,
) -> Result<(Guard, DiskRecord)> {
    ownership::owned(cx, cid, deadline)?;
    lock::ensure_not_copied(cx, cid)?;
    for snapshot in lock::pending_snapshots(cx, cid)? {
        // Its snapshot_disk was killed.
        backup::recover(cx, &snapshot, deadline).map_err(|e| {
            e.during(format!("remove the incomplete snapshot '{snapshot}' of disk '{cid}'"))
        })?;
    }
    lock(cx, cid, deadline)
}
