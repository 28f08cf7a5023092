//! Recovery of a disk whose create_disk, delete_disk or update_disk was interrupted.

use std::time::Instant;

use super::{copy, delete};
use crate::cid::DiskCid;
use crate::cpi::context::Context;
use crate::cpi::creation::pending;
use crate::error::Result;
use crate::store::{DiskRecord, Phase, Rank};

/// Settles a copy of the disk, and removes the disk if it is not complete.
///
/// # Errors
/// [`ErrorKind::Timeout`](crate::error::ErrorKind::Timeout) if a call works on it.
pub(in crate::cpi) fn recover(cx: &Context, cid: &DiskCid, deadline: Instant) -> Result<()> {
    let lock = cx.store.lock(Rank::Disk, cid, Instant::now())?;
    let mut disk = cx.store.find::<DiskRecord>(cid)?;
    let is_half_copied = |disk: &&mut DiskRecord| {
        disk.inactive_image.is_some() && !cx.store.is_no_longer_owned(disk)
    };
    if let Some(disk) = disk.as_mut().filter(is_half_copied) {
        tracing::warn!(%cid, "settling the copy of a disk whose update_disk was interrupted");
        copy::settle(cx, disk, deadline)?;
    }
    if disk.is_none_or(|disk| disk.phase != Phase::Ready) {
        tracing::warn!(%cid, "removing a disk whose creation or deletion was interrupted");
        let metadata = cx.store.lock(Rank::Metadata, cid, deadline)?;
        delete::remove(cx, cid, lock, metadata)?;
    }
    pending::remove(cx, cid)
}
