//! Recovery of a managed network whose create_network was interrupted.

use std::time::Instant;

use super::delete;
use crate::cid::NetworkCid;
use crate::cpi::context::Context;
use crate::cpi::creation::pending;
use crate::error::Result;
use crate::store::record::NetworkRecord;
use crate::store::{Phase, Rank};

/// Removes the network if it is not complete.
///
/// # Errors
/// [`ErrorKind::Timeout`](crate::error::ErrorKind::Timeout) if a call works on it.
pub(in crate::cpi) fn recover(cx: &Context, cid: &NetworkCid) -> Result<()> {
    let lock = cx.store.short_lock(Rank::Network, NetworkRecord::bridge(cid), Instant::now())?;
    match cx.store.find::<NetworkRecord>(cid)? {
        Some(network) if network.phase == Phase::Ready => drop(lock),
        Some(network) if network.phase == Phase::Deleting => {
            tracing::warn!(%cid, "deleting a network whose removal was interrupted");
            delete::delete_unused(cx, cid, network, lock)?;
        }
        _ => {
            tracing::warn!(%cid, "removing a network whose create_network was interrupted");
            delete::remove(cx, cid)?;
            drop(lock);
        }
    }
    pending::remove(cx, cid)
}
