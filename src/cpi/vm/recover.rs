//! Recovery of a VM whose create_vm or delete_vm was interrupted.

use std::time::Instant;

use super::{delete, orphans};
use crate::cid::VmCid;
use crate::cpi::context::Context;
use crate::cpi::creation::pending;
use crate::error::Result;
use crate::store::{Phase, Rank, VmRecord};

/// Removes the VM if it is not complete.
///
/// # Errors
/// [`ErrorKind::Timeout`](crate::error::ErrorKind::Timeout) if a call works on it.
pub(in crate::cpi) fn recover(cx: &Context, cid: &VmCid, deadline: Instant) -> Result<()> {
    let lock = cx.store.lock(Rank::Vm, cid, Instant::now())?;
    match cx.store.find::<VmRecord>(cid)? {
        Some(vm) if vm.phase == Phase::Ready => pending::remove(cx, cid),
        // `deleting`: a create that failed was interrupted while it rolled back.
        Some(vm) => {
            tracing::warn!(%cid, "removing a VM whose create_vm was interrupted");
            delete::destroy(cx, &vm, lock, deadline)
        }
        None => {
            orphans::remove(cx, cid, deadline)?;
            delete::remove(cx, cid, lock)
        }
    }
}
