//! Which objects this host has: for a scheduler, and for a call that a group sends to every host.

use crate::cid::{Cid, DiskCid, NetworkCid, SnapshotCid, StemcellCid, VmCid};
use crate::cpi::context::Context;
use crate::error::Result;
use crate::store::record::NetworkRecord;
use crate::store::{DiskRecord, Record, SnapshotRecord, StemcellRecord, VmRecord, atomic};

/// Which of `cids` are on this host.
///
/// # Errors
/// As [`is_present`].
pub fn present(cx: &Context, cids: &[String]) -> Result<Vec<String>> {
    let present = |cid: &String| Ok(is_present(cx, cid)?.then(|| cid.clone()));
    cids.iter().filter_map(|cid| present(cid).transpose()).collect()
}

/// Whether this host has anything of `cid`, even a lock that a delete left; or reaches a disk
/// without an owner.
///
/// # Errors
/// If the state directory is not mounted, or if there is no record and a shared pool that may have
/// the disk does not answer.
pub fn is_present(cx: &Context, cid: &str) -> Result<bool> {
    cx.store.ensure_mounted()?;
    Ok(match cid.split('-').next() {
        Some(VmCid::PREFIX) => {
            has_record::<VmRecord>(cx, cid)
                || VmCid::parse(cid).is_ok_and(|vm| cx.store.vm(&vm).run.exists())
        }
        Some(DiskCid::PREFIX) => {
            return DiskCid::parse(cid).map_or(Ok(false), |disk| is_disk_present(cx, &disk));
        }
        Some(SnapshotCid::PREFIX) => has_record::<SnapshotRecord>(cx, cid),
        Some(StemcellCid::PREFIX) => has_record::<StemcellRecord>(cx, cid),
        Some(NetworkCid::PREFIX) => has_record::<NetworkRecord>(cx, cid),
        _ => false,
    })
}

fn is_disk_present(cx: &Context, cid: &DiskCid) -> Result<bool> {
    if !has_record::<DiskRecord>(cx, cid.as_str()) {
        return cx.store.can_take(cid);
    }
    let record = cx.store.read::<DiskRecord>(cid).ok().flatten();
    match record.is_some_and(|disk| cx.store.is_no_longer_owned(&disk)) {
        true => cx.store.can_take(cid),
        false => Ok(true),
    }
}

fn has_record<R: Record>(cx: &Context, cid: &str) -> bool {
    let exists = |cid: R::Cid| {
        atomic::entry_exists(&cx.store.record_dir::<R>(&cid)) || cx.store.has_lock(R::RANK, &cid)
    };
    R::Cid::parse(cid).is_ok_and(exists)
}
