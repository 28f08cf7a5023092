//! Which host owns a disk in a shared pool. A call that names a disk without an owner takes
//! ownership first.

use std::time::Instant;

use super::lock;
use crate::cid::DiskCid;
use crate::cpi::context::Context;
use crate::error::Result;
use crate::store::{DiskRecord, Phase, Rank, VmRecord};

/// has_disk: whether the disk exists on this host, or without an owner in a shared pool.
pub(in crate::cpi) fn exists(cx: &Context, cid: &DiskCid) -> Result<bool> {
    match cx.store.find::<DiskRecord>(cid)? {
        Some(disk) => Ok(disk.phase != Phase::Creating),
        None if cx.store.can_take(cid)? => Ok(true),
        // A Director that hears "no" forgets the disk, so a disk that another host owns is an
        // error.
        None => cx.store.ensure_not_owned_elsewhere(cid).map(|()| false),
    }
}

/// Returns the record of a disk this host owns, taking ownership first if the disk has no owner.
///
/// # Errors
/// [`ErrorKind::DiskNotFound`](crate::error::ErrorKind::DiskNotFound);
/// [`ErrorKind::Conflict`](crate::error::ErrorKind::Conflict) if another host owns it.
pub(super) fn owned(cx: &Context, cid: &DiskCid, deadline: Instant) -> Result<DiskRecord> {
    take_unowned(cx, cid, deadline)?;
    if cx.store.find::<DiskRecord>(cid)?.is_none() {
        cx.store.ensure_not_owned_elsewhere(cid)?;
    }
    let disk = lock::find(cx, cid)?;
    cx.store.ensure_owned(&disk)?;
    Ok(disk)
}

/// Takes ownership of the disk, if it has no owner. A record from before this host gave it up is
/// replaced.
pub(super) fn take_unowned(cx: &Context, cid: &DiskCid, deadline: Instant) -> Result<()> {
    let has_no_owner = || match cx.store.find::<DiskRecord>(cid)? {
        Some(disk) => Ok(cx.store.has_no_owner(&disk)? && !is_listed(cx, cid)?),
        None => cx.store.can_take(cid),
    };
    if !has_no_owner()? {
        return Ok(());
    }
    cx.store.prepare()?;
    let lock = lock::lock(cx, cid, deadline)?;
    if !has_no_owner()? {
        return match cx.store.find::<DiskRecord>(cid)? {
            Some(_) => Ok(()),
            None => lock.unlink(),
        };
    }
    let metadata = cx.store.lock(Rank::Metadata, cid, deadline)?;
    cx.store.remove_local(cid)?;
    metadata.unlink()?;
    match cx.store.take_unowned(cid) {
        Ok(true) => {
            tracing::info!("took ownership of disk {cid}: it had no owner");
            Ok(())
        }
        other => lock.unlink().and(other.map(drop)),
    }
}

/// Whether the record of a VM on this host lists the disk: that record decides.
fn is_listed(cx: &Context, disk: &DiskCid) -> Result<bool> {
    Ok(cx.store.list_readable::<VmRecord>()?.iter().any(|vm| vm.attachment(disk).is_some()))
}
