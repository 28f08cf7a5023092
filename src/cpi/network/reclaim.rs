//! Reclaiming the range of a managed network whose cid its Director never received, as
//! [`vm`](crate::cpi::vm) does with addresses.

use std::time::Instant;

use super::delete;
use crate::cid::{Cid, NetworkCid};
use crate::cpi::context::Context;
use crate::cpi::creation::acknowledgement;
use crate::error::{ErrorKind, Result};
use crate::store::record::NetworkRecord;
use crate::store::{Phase, Rank};

/// Removes the network if it is not complete, or if it is the same Director's and unacknowledged.
/// Returns whether it was.
pub(super) fn reclaim(cx: &Context, network: &str) -> Result<bool> {
    let Ok(cid) = NetworkCid::parse(network) else { return Ok(false) };
    let lock = match cx.store.short_lock(Rank::Network, NetworkRecord::bridge(&cid), Instant::now())
    {
        // A call that works on the network knows its cid.
        Err(error) if error.kind() == ErrorKind::Timeout => return Ok(false),
        lock => lock?,
    };
    let Ok(Some(record)) = cx.store.read::<NetworkRecord>(&cid) else { return Ok(false) };
    if record.phase == Phase::Ready && !is_reclaimable(cx, &record)? {
        return Ok(false);
    }
    tracing::warn!(
        %cid,
        "removing a network that is incomplete or unacknowledged: its range is reused"
    );
    match delete::delete_unused(cx, &cid, record, lock) {
        Err(used) if used.kind() == ErrorKind::Conflict => Ok(false),
        deleted => deleted.map(|()| true),
    }
}

fn is_reclaimable(cx: &Context, record: &NetworkRecord) -> Result<bool> {
    let same_director = record.director.is_some() && record.director == cx.director;
    Ok(same_director && acknowledgement::is_unacknowledged::<NetworkRecord>(cx, &record.cid)?)
}
