//! delete_stemcell.

use std::os::unix::fs::MetadataExt;

use crate::cid::StemcellCid;
use crate::cpi::context::Context;
use crate::cpi::creation::pending;
use crate::error::Result;
use crate::store::layout::STEMCELL_IMAGE;
use crate::store::{Phase, Rank, StemcellRecord, VmRecord, atomic, beneath};

/// Deletes the stemcell. VMs made of it keep the image: each has a link of its own
/// ([`crate::store::layout`]).
pub(in crate::cpi) fn delete(cx: &Context, cid: &StemcellCid) -> Result<()> {
    if !atomic::entry_exists(&cx.store.stemcell_dir(cid)) && !cx.store.has_lock(Rank::Stemcell, cid)
    {
        return cx.store.ensure_mounted();
    }
    let lock = cx.store.lock(Rank::Stemcell, cid, cx.deadline("delete_stemcell"))?;
    if let Some(mut record) = cx.store.find::<StemcellRecord>(cid)? {
        log_users(cx, &record)?;
        record.phase = Phase::Deleting;
        cx.store.write_deleting(&record)?;
    }
    cx.store.remove::<StemcellRecord>(cid)?;
    lock.unlink()?;
    // A create that was killed and is now cancelled has left it.
    pending::remove(cx, cid)
}

/// Logs which VMs keep the image: its space is free when the last of them is deleted.
fn log_users(cx: &Context, stemcell: &StemcellRecord) -> Result<()> {
    let vms = cx.store.list::<VmRecord>()?.into_iter().filter(|vm| {
        let record = cx.store.find::<VmRecord>(vm);
        record.is_ok_and(|vm| vm.is_some_and(|vm| vm.stemcell == stemcell.cid))
    });
    let vms: Vec<_> = vms.map(|vm| vm.to_string()).collect();
    let dir = cx.store.images_dir(&stemcell.cid, stemcell.pool.as_deref())?;
    // A light stemcell has no image here.
    let links = beneath::metadata(&dir.join(STEMCELL_IMAGE))
        .map_or(0, |meta| meta.nlink().saturating_sub(1));
    let cid = &stemcell.cid;
    if !vms.is_empty() {
        tracing::info!(%cid, vms = vms.join(", "), "VMs keep the stemcell's image");
    } else if links > 0 {
        tracing::info!(%cid, links, "other stemcells share the stemcell's image");
    }
    Ok(())
}
