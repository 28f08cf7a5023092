//! A disk in a shared pool loses its owner, so that another host can take it. A group asks for this
//! before it attaches the disk on that host.

use super::{access, attachment, lock, settled};
use crate::cid::DiskCid;
use crate::cpi::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{DiskRecord, Rank};

/// Gives up this host's ownership of the disk.
///
/// # Errors
/// [`ErrorKind::Conflict`] if the disk is used here or no other host reaches it;
/// [`ErrorKind::DiskNotFound`].
pub(crate) fn release(cx: &Context, cid: &DiskCid) -> Result<()> {
    let deadline = cx.deadline("attach_disk");
    if cx.store.find::<DiskRecord>(cid)?.is_none() && cx.store.can_take(cid)? {
        // An earlier call has given it up, or was interrupted.
        let lock = lock::lock(cx, cid, deadline)?;
        if cx.store.find::<DiskRecord>(cid)?.is_none() {
            cx.store.remove_record::<DiskRecord>(cid)?;
            return cx.store.finish_release(cid).and(lock.unlink());
        }
    }
    let (lock, disk) = settled::lock_unless_copied(cx, cid, deadline)?;
    ensure_movable(cx, &disk)?;
    if let Some(holder) = attachment::settle(cx, &disk, deadline)? {
        let error = refusal(&disk, &format!("is attached to VM '{holder}'"));
        return Err(error.hint("detach it first"));
    }
    access::ensure_closed(cx, &disk)?;
    let metadata = cx.store.lock(Rank::Metadata, cid, deadline)?;
    cx.store.release(&disk)?;
    tracing::info!(%cid, "released the disk: it has no owner now");
    metadata.unlink()?;
    lock.unlink()
}

/// Ensures that another host can use the disk.
fn ensure_movable(cx: &Context, disk: &DiskRecord) -> Result<()> {
    if !disk.pool.as_deref().is_some_and(|pool| cx.store.pools().is_shared(pool)) {
        return Err(refusal(disk, "is in no shared pool"));
    }
    if disk.inactive_image.is_some() {
        return Err(refusal(
            disk,
            "has an image that an earlier copy left and that cannot be removed",
        ));
    }
    if disk.encrypted && cx.config.key_file.is_none() {
        let error = refusal(disk, "is encrypted with a key that only this host has");
        return Err(error.hint(
            "give all hosts one 'key_file' with this host's key in it; or make the disk \
             `encrypted: false` first",
        ));
    }
    Ok(())
}

fn refusal(disk: &DiskRecord, why: &str) -> Error {
    Error::new(ErrorKind::Conflict, format!("disk '{}' {why}", disk.cid))
}
