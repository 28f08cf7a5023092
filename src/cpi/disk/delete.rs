//! delete_disk.

use super::{access, attachment, copy, lock, ownership};
use crate::cid::DiskCid;
use crate::cpi::context::Context;
use crate::cpi::creation::pending;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{DiskRecord, Guard, Phase, Rank, atomic};

/// Deletes a disk that is not attached, and its data.
pub(in crate::cpi) fn delete(cx: &Context, cid: &DiskCid) -> Result<()> {
    let deadline = cx.deadline("delete_disk");
    let (lock, mut disk) = loop {
        ownership::take_unowned(cx, cid, deadline)?;
        if !atomic::entry_exists(&cx.store.disk_dir(cid)) && !cx.store.has_lock(Rank::Disk, cid) {
            return cx
                .store
                .ensure_mounted()
                .and_then(|()| cx.store.ensure_not_owned_elsewhere(cid));
        }
        let lock = lock::lock(cx, cid, deadline)?;
        match cx.store.find::<DiskRecord>(cid)? {
            Some(disk) => break (lock, disk),
            // This host gave it up while this call waited.
            None if cx.store.can_take(cid)? => {}
            None => {
                if let Err(error) = cx.store.ensure_not_owned_elsewhere(cid) {
                    return lock.unlink().and(Err(error));
                }
                // An earlier delete was interrupted at its last steps: only the directory or the
                // lock is left.
                let metadata = cx.store.lock(Rank::Metadata, cid, deadline)?;
                return remove(cx, cid, lock, metadata);
            }
        }
    };
    cx.store.ensure_owned(&disk)?;
    copy::settle(cx, &mut disk, deadline)?;
    if let Some(holder) = attachment::settle(cx, &disk, deadline)? {
        let message = format!("disk '{cid}' is attached to VM '{holder}'");
        return Err(Error::new(ErrorKind::Conflict, message).hint("detach it first"));
    }
    access::ensure_closed(cx, &disk)?;
    let metadata = cx.store.lock(Rank::Metadata, cid, deadline)?;
    disk.phase = Phase::Deleting;
    cx.store.write_deleting(&disk)?;
    remove(cx, cid, lock, metadata)
}

/// Removes what this host has of a disk, with the images if it owns the disk, and its pending note.
/// The metadata lock keeps set_disk_metadata from writing a file for a disk that is gone.
pub(super) fn remove(cx: &Context, cid: &DiskCid, lock: Guard, metadata: Guard) -> Result<()> {
    let record = cx.store.read::<DiskRecord>(cid)?;
    match record.map_or(Ok(()), |disk| cx.store.ensure_owned(&disk)) {
        Err(error) if error.kind() == ErrorKind::Conflict => cx.store.remove_local(cid)?,
        owned => owned.and_then(|()| cx.store.remove::<DiskRecord>(cid))?,
    }
    metadata.unlink()?;
    lock.unlink()?;
    pending::remove(cx, cid)
}
