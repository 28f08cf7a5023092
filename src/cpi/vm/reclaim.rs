//! Reclaiming addresses and host ports from VMs whose cid their Director never received.
//!
//! A Director that gives an address to another VM does not know of the VM that holds it. Without
//! this, one killed create_vm would keep a static address until an operator deletes its VM, and a
//! power cut during a deployment would keep many.

use std::time::{Duration, Instant};

use super::{delete, recover};
use crate::cid::VmCid;
use crate::cpi::context::Context;
use crate::cpi::creation::acknowledgement;
use crate::cpi::network::nics::PlannedNic;
use crate::cpi::properties::VmCloudProperties;
use crate::error::{ErrorKind, Result};
use crate::store::reservations::Reservation;
use crate::store::{Phase, Rank, VmRecord};

/// How long the launch of a killed create may take to be undone. A create that waits has reserved
/// nothing, so no other create waits for it.
const LAUNCH_UNDO_TIMEOUT: Duration = Duration::from_secs(30);

/// Removes the unacknowledged VMs that hold an address or host port of the new VM. Returns whether
/// there were any.
pub(super) fn reclaim(
    cx: &Context,
    nics: &[PlannedNic],
    properties: &VmCloudProperties,
    deadline: Instant,
) -> Result<bool> {
    let mut reclaimed = false;
    for holder in holders(cx, nics, properties, deadline)? {
        reclaimed |= remove_if_unacknowledged(cx, &holder, deadline)?;
    }
    Ok(reclaimed)
}

/// The VMs that hold an address or host port of the new VM.
fn holders(
    cx: &Context,
    nics: &[PlannedNic],
    properties: &VmCloudProperties,
    deadline: Instant,
) -> Result<Vec<VmCid>> {
    let wires = nics.iter().filter_map(|planned| {
        let (_, segment) = planned.nic.tap()?;
        Some((segment, planned.nic.rules.as_ref()?))
    });
    let addresses = wires.flat_map(|(segment, rules)| {
        rules.addresses.iter().map(|block| Reservation::block(segment, *block))
    });
    let ports = properties.ports.iter().flat_map(|forward| {
        let (protocol, address) = (forward.protocol, forward.address);
        let range = forward.host.first..=forward.host.last;
        range.map(move |port| Reservation::Port { protocol, port, address })
    });
    let mut holders = cx.store.with_reservations(deadline, |reservations| {
        let holders = addresses.chain(ports).map(|reservation| reservations.holder(&reservation));
        holders.filter_map(Result::transpose).collect::<Result<Vec<_>>>()
    })?;
    holders.sort();
    holders.dedup();
    Ok(holders)
}

fn remove_if_unacknowledged(cx: &Context, cid: &VmCid, deadline: Instant) -> Result<bool> {
    let phase = cx.store.read::<VmRecord>(cid)?.map(|vm| vm.phase);
    // The launch of a killed create is undone in a moment. A call that works on a VM that is ready
    // knows its cid.
    let timeout = match phase {
        Some(Phase::Ready) => Duration::ZERO,
        _ => LAUNCH_UNDO_TIMEOUT,
    };
    let lock = match cx.store.lock(Rank::Vm, cid, deadline.min(Instant::now() + timeout)) {
        Err(error) if error.kind() == ErrorKind::Timeout => return Ok(false),
        lock => lock?,
    };
    match cx.store.read::<VmRecord>(cid)? {
        Some(vm) if is_reclaimable(cx, &vm)? => {
            tracing::warn!(
                %cid,
                "removing an unacknowledged VM: its Director reuses its address"
            );
            delete::destroy(cx, &vm, lock, deadline).map(|()| true)
        }
        Some(vm) if vm.phase == Phase::Ready => Ok(false),
        _ => {
            drop(lock);
            recover::recover(cx, cid, deadline).map(|()| true)
        }
    }
}

fn is_reclaimable(cx: &Context, vm: &VmRecord) -> Result<bool> {
    let same_director = vm.director.is_some() && vm.director == cx.director;
    Ok(same_director && acknowledgement::is_vm_unacknowledged(cx, vm)?)
}
