//! delete_network.

use std::time::Instant;

use super::managed;
use crate::cid::{Cid, NetworkCid};
use crate::cpi::context::Context;
use crate::cpi::creation::{self, pending};
use crate::error::{Error, ErrorKind, Result};
use crate::net;
use crate::store::record::NetworkRecord;
use crate::store::{Phase, Rank, ShortLock, atomic};

/// Deletes a managed network that no VM uses.
///
/// # Errors
/// [`ErrorKind::NetworkNotFound`], [`ErrorKind::Conflict`] naming the VMs that use it.
pub(crate) fn delete(cx: &Context, cid: &NetworkCid) -> Result<()> {
    if !atomic::entry_exists(&cx.store.record_dir::<NetworkRecord>(cid)) {
        cx.store.ensure_mounted()?;
        return Err(managed::not_found(cid));
    }
    let deadline = cx.deadline("delete_network");
    let lock = cx.store.short_lock(Rank::Network, NetworkRecord::bridge(cid), deadline)?;
    let Some(record) = cx.store.find::<NetworkRecord>(cid)? else {
        // An empty directory: an earlier delete was interrupted at its last step.
        cx.store.remove::<NetworkRecord>(cid)?;
        pending::remove(cx, cid)?;
        return Err(managed::not_found(cid));
    };
    delete_unused(cx, cid, record, lock)
}

/// Deletes the network, or makes it ready again if a VM uses it.
///
/// # Errors
/// [`ErrorKind::Conflict`] if a VM does.
pub(super) fn delete_unused(
    cx: &Context,
    cid: &NetworkCid,
    record: NetworkRecord,
    _lock: ShortLock,
) -> Result<()> {
    cx.store.write_deleting(&NetworkRecord { phase: Phase::Deleting, ..record.clone() })?;
    match ensure_unused(cx, cid, cx.deadline("delete_network")) {
        // A network that VMs use was ready, whatever phase an interrupted call has left.
        Err(used) if used.kind() == ErrorKind::Conflict => {
            creation::reinstate(cx, record)?;
            Err(used)
        }
        Err(unknown) => cx.store.write(&record).and(Err(unknown)),
        Ok(()) => remove(cx, cid).and(pending::remove(cx, cid)),
    }
}

/// Ensures that no VM has reserved addresses on the network.
fn ensure_unused(cx: &Context, cid: &NetworkCid, deadline: Instant) -> Result<()> {
    let bridge = NetworkRecord::bridge(cid);
    let users =
        cx.store.with_reservations(deadline, |reservations| reservations.vms_on_wire(&bridge))?;
    if users.is_empty() {
        return Ok(());
    }
    let users: Vec<_> = users.iter().map(|vm| format!("'{vm}'")).collect();
    let message = format!("network '{cid}' is used by VM {}", users.join(", "));
    Err(Error::new(ErrorKind::Conflict, message))
}

/// Removes everything of a managed network, complete or not. The caller holds its lock.
pub(super) fn remove(cx: &Context, cid: &NetworkCid) -> Result<()> {
    if let Some(record) = cx.store.find::<NetworkRecord>(cid)? {
        // The pin has the segment as it was made; the profile may have changed since.
        let pin = cx.store.pins()?.into_iter().find(|pin| pin.network == cid.as_str());
        let segment = pin.map_or_else(|| managed::segment(cx, &record), Ok)?;
        net::bridge_owners::remove_owner(&segment.bridge, &cx.store.state_dir_id()?)?;
        net::apply::release(&segment)?;
        // Last: an interrupted delete needs the pin when it is repeated.
        cx.store.unpin(&segment.bridge)?;
    }
    cx.store.remove::<NetworkRecord>(cid)
}
