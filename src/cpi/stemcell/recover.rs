//! Recovery of a stemcell whose create_stemcell or delete_stemcell was interrupted.

use std::time::Instant;

use crate::cid::StemcellCid;
use crate::cpi::context::Context;
use crate::cpi::creation::pending;
use crate::error::Result;
use crate::store::{Rank, StemcellRecord};

/// Removes the stemcell if it is not complete.
///
/// # Errors
/// [`ErrorKind::Timeout`](crate::error::ErrorKind::Timeout) if a call works on it.
pub(in crate::cpi) fn recover(cx: &Context, cid: &StemcellCid) -> Result<()> {
    let lock = cx.store.lock(Rank::Stemcell, cid, Instant::now())?;
    if cx.ready::<StemcellRecord>(cid)?.is_none() {
        tracing::warn!(%cid, "removing a stemcell whose creation or deletion was interrupted");
        cx.store.remove::<StemcellRecord>(cid)?;
        lock.unlink()?;
    }
    pending::remove(cx, cid)
}
