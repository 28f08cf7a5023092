//! VMs that are gone, but not with everything: somebody removed their directories by hand.
//!
//! Nothing in the kernel says which state directory it is of, and several may share a host. But every tap, rule and group is
//! named after its VM's cid, and a removal takes the names in our own directories last: the run directory, the uid, the
//! claims, the lock. So whoever is named there was ours, and all that bears its name is; what nothing names is left alone.

use std::collections::BTreeSet;

use super::names::Recorded;
use super::{Audit, Kind};
use crate::cid::{Cid, VmCid};
use crate::cpi::Cpi;
use crate::cpi::power::numbers;
use crate::error::Result;
use crate::host::cgroup::Cgroup;
use crate::host::uids;
use crate::link_name::LinkName;
use crate::net::{apply, guard, tap};
use crate::qemu::topology::MAX_NICS;
use crate::store::record::Nic;
use crate::store::reservations::{self, Reservation};
use crate::store::{Rank, VmPaths, VmRecord, atomic};
use crate::supervisor::{self, Button, PowerState, power_state};

/// What is left of one VM.
struct Remains {
    vm: VmCid,
    paths: VmPaths,
    /// Its QEMU's process, if that runs.
    qemu: Option<i32>,
    taps: Vec<LinkName>,
    rules: guard::Remains,
    claims: Vec<Reservation>,
    /// Bridges of ours that it was on and nobody is now.
    bridges: Vec<LinkName>,
    group: Cgroup,
    uids: Vec<u32>,
    locked: bool,
}

impl Audit<'_> {
    pub(super) fn gone_vms(&mut self) -> Result<()> {
        let recorded = self.recorded()?;
        for vm in self.named_vms()? {
            // A link to nothing is a VM whose filesystem is not mounted.
            if atomic::entry_exists(&self.cpi.store.vm(&vm).dir) {
                continue;
            }
            let Some(lock) = self.hold(Rank::Vm, &vm) else { continue };
            let locked = lock.had_file();
            if atomic::entry_exists(&self.cpi.store.vm(&vm).dir) || self.cpi.has_note(&vm) {
                continue;
            }
            let looked = self.remains(&vm, locked, &recorded);
            let looked = looked.and_then(|remains| Ok((remains.group.processes()?, remains)));
            let (strangers, remains) = match looked {
                Ok(looked) => looked,
                Err(error) => {
                    self.unknown(&vm, &error);
                    continue;
                }
            };
            if remains.qemu.is_none() && !strangers.is_empty() {
                let why = format!(
                    "the VM is gone, but its control group has the processes {}",
                    numbers(&strangers)
                );
                let next =
                    "no pid file of ours says whose they are: see `ps`, end them, then repeat `gc`";
                self.told(Kind::Orphan, &vm, &why, next);
                continue;
            }
            let (cpi, words) = (self.cpi, remains.words());
            if words.is_empty() {
                lock.unlink()?;
                continue;
            }
            let mut lock = Some(lock);
            let why = format!("the VM is gone, but not its {}", words.join(", "));
            self.found(Kind::Orphan, &vm, &why, || {
                remains.remove(cpi)?;
                lock.take().expect("taken once").unlink()
            });
            // One that was not there before is not left.
            if let Some(lock) = lock.filter(|_| !locked) {
                lock.unlink()?;
            }
        }
        Ok(())
    }

    /// The VMs that our own directories name.
    fn named_vms(&self) -> Result<BTreeSet<VmCid>> {
        let store = &self.cpi.store;
        let mut named: BTreeSet<_> = store.vms_with_run_dir()?.into_iter().collect();
        named.extend(store.reservations()?.into_iter().map(|(_, vm)| vm));
        named.extend(uids::claims(store.state_dir())?.into_iter().filter_map(|(_, owner)| owner));
        let locks = store.locks()?.into_iter().filter(|(rank, _)| *rank == Rank::Vm);
        named.extend(locks.filter_map(|(_, name)| VmCid::parse(&name).ok()));
        Ok(named)
    }

    /// What is another VM's by its record is none of its remains, whatever the name says.
    fn remains(&self, vm: &VmCid, locked: bool, recorded: &Recorded) -> Result<Remains> {
        let store = &self.cpi.store;
        let paths = store.vm(vm);
        let mut claims = store.reservations()?;
        claims.retain(|(claim, holder)| holder == vm && !recorded.claims.contains(&claim.name()));
        let claims: Vec<_> = claims.into_iter().map(|(claim, _)| claim).collect();
        let (mut places, mut ports) = (Vec::new(), Vec::new());
        for claim in &claims {
            match claim {
                Reservation::Addresses { wire, block } => {
                    places.extend(reservations::bridge(wire).map(|bridge| (bridge, *block)))
                }
                Reservation::Port { protocol, port, .. } => ports.push((protocol.number(), *port)),
            }
        }
        let wires: BTreeSet<_> = places.iter().map(|(bridge, _)| bridge.clone()).collect();
        let taps: Vec<_> = (0..MAX_NICS).map(|index| tap::tap_name(vm, index)).collect();
        let mut uids = uids::claims(store.state_dir())?;
        uids.retain(|(uid, owner)| owner.as_ref() == Some(vm) && !recorded.uids.contains(uid));
        let qemu = match power_state(&paths)? {
            PowerState::On(qemu) => Some(qemu.pid()),
            PowerState::Off => None,
        };
        Ok(Remains {
            vm: vm.clone(),
            paths,
            qemu,
            rules: guard::remains(&taps, &places, &ports)?,
            taps: apply::present(&taps)?,
            claims,
            bridges: wires.into_iter().filter(|bridge| self.is_unused(bridge)).collect(),
            group: Cgroup::open(vm.as_str()),
            uids: uids.into_iter().map(|(uid, _)| uid).collect(),
            locked,
        })
    }

    /// Whether no VM and no pin of ours has the bridge. What can not be read may have it.
    fn is_unused(&self, bridge: &LinkName) -> bool {
        let store = &self.cpi.store;
        let uses = |vm: &VmRecord| {
            vm.nics.iter().filter_map(Nic::tap).any(|(_, segment)| segment.bridge == *bridge)
        };
        let is_on = |vm: &VmCid| {
            store.read::<VmRecord>(vm).map_or(true, |vm| vm.as_ref().is_some_and(uses))
        };
        !store.is_pinned(bridge) && store.list::<VmRecord>().is_ok_and(|vms| !vms.iter().any(is_on))
    }
}

impl Cpi {
    /// Removes all that is named after a VM that has no record. The caller holds its lock, and its processes have ended.
    pub(in crate::cpi) fn remove_remains(&self, vm: &VmCid) -> Result<()> {
        let audit = Audit { cpi: self, mend: true, findings: Vec::new() };
        audit.remains(vm, true, &audit.recorded()?)?.remove(self)
    }
}

impl Remains {
    fn words(&self) -> Vec<String> {
        let mut words = Vec::new();
        words.extend(self.qemu.map(|pid| format!("QEMU, process {pid}")));
        words.extend(self.taps.iter().map(|tap| format!("tap {tap}")));
        words.extend(
            (!self.rules.is_empty()).then(|| "elements in table bosh-qemu-guard".to_owned()),
        );
        words.extend(self.claims.iter().map(|claim| format!("claim {}", claim.name())));
        words.extend(
            self.bridges
                .iter()
                .filter(|b| apply::is_stray(b).unwrap_or(false))
                .map(|b| format!("bridge {b}")),
        );
        words.extend(self.group.exists().then(|| "control group".to_owned()));
        words.extend(self.uids.iter().map(|uid| format!("uid {uid}")));
        words.extend(self.paths.run.exists().then(|| "run directory".to_owned()));
        words.extend(self.locked.then(|| "lock".to_owned()));
        words
    }

    /// In the order of `delete_vm`: what names it last.
    fn remove(&self, cpi: &Cpi) -> Result<()> {
        let deadline = Audit::deadline();
        // Of its disks nobody knows any more: it may have some that are kept.
        supervisor::stop(&self.paths, Button::Quit, deadline)?;
        if self.qemu.is_some() {
            self.group.kill(deadline)?;
        }
        for tap in &self.taps {
            apply::remove_tap(tap)?;
        }
        for bridge in &self.bridges {
            let _lock = cpi.store.short_lock(Rank::Network, bridge, deadline)?;
            apply::release_stray(bridge)?;
        }
        self.rules.remove()?;
        self.group.remove()?;
        cpi.store.release_reservations(&self.vm)?;
        for uid in &self.uids {
            uids::release(cpi.store.state_dir(), &self.vm, *uid)?;
        }
        atomic::remove_dir(&self.paths.run)
    }
}
