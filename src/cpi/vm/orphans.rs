//! What is left of a VM that has no record: its QEMU, taps, rules, reservations, control group,
//! uids.
//!
//! The kernel does not say which state directory a tap or a process belongs to, and several may
//! share a host. But each is named after its VM's cid, and a delete removes the names in the state
//! directory last: the run directory, the uid, the reservations, the lock. So a cid that is named
//! there was a VM of this state directory, and everything that bears the cid is its own. What no
//! name stands for is left alone.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::cid::{Cid, VmCid};
use crate::cpi::context::Context;
use crate::error::Result;
use crate::host::cgroup::Cgroup;
use crate::host::uids;
use crate::link_name::LinkName;
use crate::net::{apply, filter, tap};
use crate::qemu::topology::MAX_NICS;
use crate::store::record::Nic;
use crate::store::reservations::{self, Reservation};
use crate::store::{Rank, VmPaths, VmRecord, atomic};
use crate::supervisor::{self, PowerState, StopMode, power_state};
use crate::sys::pidfd::Process;

/// What is left of one VM.
pub(crate) struct Orphans {
    vm: VmCid,
    paths: VmPaths,
    /// The pid of its QEMU, if that runs.
    qemu: Option<i32>,
    taps: Vec<LinkName>,
    rules: filter::StrayElements,
    reservations: Vec<Reservation>,
    /// Bridges of this host's networks that the VM was on and no VM uses.
    bridges: Vec<LinkName>,
    cgroup: Cgroup,
    uids: Vec<u32>,
}

/// The uids and reservations that the readable records of VMs name.
#[derive(Default)]
pub(crate) struct Recorded {
    pub(crate) uids: BTreeSet<u32>,
    /// By the names of their links in the state directory.
    pub(crate) reservations: BTreeSet<String>,
}

/// Ends the processes of a VM that has no record and removes what is left of it. The caller holds
/// the VM's lock.
pub(super) fn remove(cx: &Context, vm: &VmCid, deadline: Instant) -> Result<()> {
    supervisor::stop(&cx.store.vm(vm), StopMode::Quit, deadline)?;
    Cgroup::open(vm.as_str()).kill(deadline)?;
    Orphans::find(cx, vm, &Recorded::read(cx)?)?.remove(cx, deadline)
}

/// The VMs that the state and run directories name, with and without a record.
pub(crate) fn named_vms(cx: &Context) -> Result<BTreeSet<VmCid>> {
    let store = &cx.store;
    let mut named: BTreeSet<_> = store.vms_with_run_dir()?.into_iter().collect();
    named.extend(store.reservations()?.into_iter().map(|(_, vm)| vm));
    named.extend(uids::reservations(store.state_dir())?.into_iter().filter_map(|(_, owner)| owner));
    let locks = store.locks()?.into_iter().filter(|(rank, _)| *rank == Rank::Vm);
    named.extend(locks.filter_map(|(_, name)| VmCid::parse(&name).ok()));
    Ok(named)
}

impl Recorded {
    /// Reads the records of all VMs.
    pub(crate) fn read(cx: &Context) -> Result<Self> {
        let mut recorded = Self::default();
        for vm in cx.store.list_readable::<VmRecord>()? {
            recorded.uids.insert(vm.uid);
            recorded.reservations.extend(Reservation::all_of(&vm).iter().map(Reservation::name));
        }
        Ok(recorded)
    }
}

impl Orphans {
    /// Looks for what is left of `vm`, less what a record gives to another VM.
    pub(crate) fn find(cx: &Context, vm: &VmCid, recorded: &Recorded) -> Result<Self> {
        let store = &cx.store;
        let paths = store.vm(vm);
        let mut reservations = store.reservations()?;
        reservations.retain(|(reservation, holder)| {
            holder == vm && !recorded.reservations.contains(&reservation.name())
        });
        let reservations: Vec<_> =
            reservations.into_iter().map(|(reservation, _)| reservation).collect();
        let (mut addresses, mut ports) = (Vec::new(), Vec::new());
        for reservation in &reservations {
            match reservation {
                Reservation::Addresses { wire, block } => {
                    addresses.extend(reservations::bridge(wire).map(|bridge| (bridge, *block)));
                }
                Reservation::Port { protocol, port, .. } => ports.push((protocol.number(), *port)),
            }
        }
        let bridges: BTreeSet<_> = addresses.iter().map(|(bridge, _)| bridge.clone()).collect();
        let taps: Vec<_> = (0..MAX_NICS).map(|index| tap::tap_name(vm, index)).collect();
        let mut uids = uids::reservations(store.state_dir())?;
        uids.retain(|(uid, owner)| owner.as_ref() == Some(vm) && !recorded.uids.contains(uid));
        let qemu = match power_state(&paths)? {
            PowerState::On(qemu) => Some(qemu.pid()),
            PowerState::Off => None,
        };
        Ok(Self {
            vm: vm.clone(),
            paths,
            qemu,
            rules: filter::stray_elements(&taps, &addresses, &ports)?,
            taps: apply::existing_links(&taps)?,
            reservations,
            bridges: bridges.into_iter().filter(|bridge| is_unused(cx, bridge)).collect(),
            cgroup: Cgroup::open(vm.as_str()),
            uids: uids.into_iter().map(|(uid, _)| uid).collect(),
        })
    }

    /// The processes in the VM's control group, if no pid file shows that its QEMU is one of them.
    pub(crate) fn unknown_processes(&self) -> Result<Vec<Process>> {
        match self.qemu {
            Some(_) => Ok(Vec::new()),
            None => self.cgroup.processes(),
        }
    }

    /// What is left, one name for each thing.
    pub(crate) fn describe(&self) -> Vec<String> {
        let mut left = Vec::new();
        left.extend(self.qemu.map(|pid| format!("QEMU, process {pid}")));
        left.extend(self.taps.iter().map(|tap| format!("tap {tap}")));
        let rules =
            (!self.rules.is_empty()).then(|| "elements in table bosh-qemu-guard".to_owned());
        left.extend(rules);
        left.extend(
            self.reservations
                .iter()
                .map(|reservation| format!("reservation {}", reservation.name())),
        );
        let bridges = self.bridges.iter().filter(|bridge| apply::is_stray(bridge).unwrap_or(false));
        left.extend(bridges.map(|bridge| format!("bridge {bridge}")));
        left.extend(self.cgroup.exists().then(|| "control group".to_owned()));
        left.extend(self.uids.iter().map(|uid| format!("uid {uid}")));
        left.extend(self.paths.run.exists().then(|| "run directory".to_owned()));
        left
    }

    /// Removes everything in the order of delete_vm: what names the VM is last.
    pub(crate) fn remove(&self, cx: &Context, deadline: Instant) -> Result<()> {
        // Its record was lost, and with it which disks it has: QEMU ends in order, as if there were
        // some.
        supervisor::stop(&self.paths, StopMode::Quit, deadline)?;
        if self.qemu.is_some() {
            self.cgroup.kill(deadline)?;
        }
        for tap in &self.taps {
            apply::remove_tap(tap)?;
        }
        for bridge in &self.bridges {
            let _lock = cx.store.short_lock(Rank::Network, bridge, deadline)?;
            apply::release_stray(bridge)?;
        }
        self.rules.remove()?;
        self.cgroup.remove()?;
        cx.store.release_reservations(&self.vm)?;
        for uid in &self.uids {
            uids::release(cx.store.state_dir(), &self.vm, *uid)?;
        }
        atomic::remove_dir(&self.paths.run)
    }
}

/// Whether no VM and no pin uses the bridge. A record that cannot be read may.
fn is_unused(cx: &Context, bridge: &LinkName) -> bool {
    let store = &cx.store;
    let uses = |vm: &VmRecord| {
        vm.nics.iter().filter_map(Nic::tap).any(|(_, segment)| segment.bridge == *bridge)
    };
    let may_use =
        |vm: &VmCid| store.read::<VmRecord>(vm).map_or(true, |vm| vm.as_ref().is_some_and(uses));
    !store.is_pinned(bridge) && store.list::<VmRecord>().is_ok_and(|vms| !vms.iter().any(may_use))
}
