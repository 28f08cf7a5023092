//! delete_vm.

use std::time::{Duration, Instant};

use super::orphans;
use crate::cid::{Cid, VmCid};
use crate::cpi::context::Context;
use crate::cpi::creation::pending;
use crate::crash;
use crate::error::{ErrorKind, Result};
use crate::host::{cgroup::Cgroup, uids};
use crate::net;
use crate::store::record::Nic;
use crate::store::{Guard, Phase, Rank, VmRecord, atomic};
use crate::supervisor::{self, StopMode};

/// `audit` holds a VM's lock for a moment. A call that holds it longer may be launching the VM.
const AUDIT_LOCK_TIMEOUT: Duration = Duration::from_millis(250);

/// Deletes the VM, whatever state it is in. Its persistent disks are kept.
pub(in crate::cpi) fn delete(cx: &Context, cid: &VmCid) -> Result<()> {
    let paths = cx.store.vm(cid);
    if !atomic::entry_exists(&paths.dir) {
        cx.store.ensure_mounted()?;
        if !paths.run.exists() && !cx.store.has_lock(Rank::Vm, cid) {
            return Ok(());
        }
    }
    let deadline = cx.deadline("delete_vm");
    let lock = match cx.store.lock(Rank::Vm, cid, Instant::now() + AUDIT_LOCK_TIMEOUT) {
        // A launch of the VM need not finish.
        Err(error) if error.kind() == ErrorKind::Timeout => {
            supervisor::cancel_launch(&paths)?;
            cx.store.lock(Rank::Vm, cid, deadline)?
        }
        free => free?,
    };
    match cx.store.find::<VmRecord>(cid)? {
        Some(vm) => destroy(cx, &vm, lock, deadline),
        // A create ended before it wrote the record, a delete after it removed it, or an operator
        // removed the directory.
        None => {
            orphans::remove(cx, cid, deadline)?;
            remove(cx, cid, lock)
        }
    }
}

/// Ends the VM and removes everything that its record names; the record last.
pub(super) fn destroy(cx: &Context, vm: &VmRecord, lock: Guard, deadline: Instant) -> Result<()> {
    let paths = cx.store.vm(&vm.cid);
    // A supervisor that reads this phase does not start the VM again.
    cx.store.write_deleting(&VmRecord { phase: Phase::Deleting, ..vm.clone() })?;
    // QEMU's caches may hold writes to a persistent disk: then it ends in order.
    let mode = if vm.disks.is_empty() { StopMode::Kill } else { StopMode::Quit };
    supervisor::stop(&paths, mode, deadline)?;
    let cgroup = Cgroup::open(vm.cid.as_str());
    // A guest that took over its QEMU may have closed the lock that shows QEMU is alive. It cannot
    // leave the control group.
    cgroup.kill(deadline)?;
    std::thread::scope(|threads| {
        // The VM sends no more. Each of the two waits for an RCU grace period of the kernel.
        let rules = threads.spawn(|| net::filter::remove(&vm.nics));
        let unplugged = unplug_nics(cx, vm, deadline);
        rules.join().expect("no panic").and(unplugged)
    })?;
    cx.store.release_reservations(&vm.cid)?;
    cgroup.remove()?;
    uids::release(cx.store.state_dir(), &vm.cid, vm.uid)?;
    remove(cx, &vm.cid, lock)
}

/// Removes the taps that are left, and the bridges that no VM uses and no pin keeps.
fn unplug_nics(cx: &Context, vm: &VmRecord, deadline: Instant) -> Result<()> {
    for (tap, segment) in vm.nics.iter().filter_map(Nic::tap) {
        let _network = cx.store.short_lock(Rank::Network, &segment.bridge, deadline)?;
        net::apply::remove_tap(tap)?;
        if !cx.store.is_pinned(&segment.bridge) {
            net::apply::release(segment)?;
        }
    }
    Ok(())
}

/// Removes the directories of a VM of which nothing else is left, its lock and its pending note.
pub(super) fn remove(cx: &Context, cid: &VmCid, lock: Guard) -> Result<()> {
    atomic::remove_dir(&cx.store.vm(cid).run)?;
    crash::point!("run directory removed");
    cx.store.remove::<VmRecord>(cid)?;
    lock.unlink()?;
    pending::remove(cx, cid)
}
