//! set_disk_metadata.

use serde_json::Map;

use super::{lock, ownership};
use crate::cid::DiskCid;
use crate::cpi::context::Context;
use crate::cpi::contract::Metadata;
use crate::cpi::creation::acknowledgement;
use crate::error::Result;
use crate::store::{DiskRecord, Rank};

/// Replaces the disk's tags. Takes the metadata lock: a snapshot or copy of the disk holds the
/// disk's lock for hours.
pub(in crate::cpi) fn set_metadata(cx: &Context, cid: &DiskCid, metadata: &Metadata) -> Result<()> {
    let deadline = cx.deadline("set_disk_metadata");
    ownership::owned(cx, cid, deadline)?;
    let _lock = cx.store.lock(Rank::Metadata, cid, deadline)?.into_short_lock();
    // It may have been deleted meanwhile; delete_disk needs this lock, too.
    lock::find(cx, cid)?;
    acknowledgement::acknowledge::<DiskRecord>(cx, cid);
    cx.store.write_disk_metadata(cid, metadata)
}

/// The disk's tags for a snapshot. A snapshot without them is better than none.
pub(super) fn metadata_of(cx: &Context, disk: &DiskRecord) -> Metadata {
    cx.store.disk_metadata(disk).unwrap_or_else(|error| {
        tracing::warn!(
            disk = %disk.cid,
            error = error.report(),
            "cannot read the disk's metadata: the snapshot has none"
        );
        Map::new()
    })
}
