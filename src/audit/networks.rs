//! What networks lack that are pinned or that running VMs are on, and bridges that nothing keeps.

use std::collections::BTreeSet;

use super::locks::ObjectLock;
use super::{Audit, Kind};
use crate::cid::{Cid, NetworkCid};
use crate::cpi::creation::pending;
use crate::cpi::network::host;
use crate::cpi::network::host::HostNetwork;
use crate::cpi::{network, recovery};
use crate::error::{ErrorKind, Result};
use crate::link_name::LinkName;
use crate::net::{apply, bridge_owners};
use crate::store::record::{NetworkRecord, Nic};
use crate::store::{Phase, Rank, VmRecord, atomic};
use crate::supervisor::{PowerState, power_state};

const NEXT: &str = "correct that; `bosh-qemu-cpi network plan` shows more";

impl Audit<'_> {
    pub(super) fn networks(&mut self) -> Result<()> {
        self.managed()?;
        for (path, error) in self.cx.store.damaged_pins()? {
            self.unusable(&path.display(), &error);
        }
        let plugged = self.plugged()?;
        match host::list(self.cx, &[]) {
            Ok(networks) => {
                networks.into_iter().try_for_each(|network| self.network(network, &plugged))
            }
            Err(error) => {
                self.for_operator(Kind::Network, &"networks", &error.report(), NEXT);
                Ok(())
            }
        }?;
        self.unpinned_bridges()
    }

    /// Managed networks whose creation or deletion was interrupted, and those that are
    /// unacknowledged.
    fn managed(&mut self) -> Result<()> {
        for cid in self.cx.store.list::<NetworkRecord>()? {
            let Some(lock) = self.lock(Rank::Network, NetworkRecord::bridge(&cid)) else {
                continue;
            };
            let record = self.cx.store.read::<NetworkRecord>(&cid);
            let phase = record.map(|record| record.map(|record| record.phase));
            let is_pending = pending::contains(self.cx, &cid);
            let is_unacknowledged = matches!(phase, Ok(Some(Phase::Ready)))
                && self.is_unacknowledged::<NetworkRecord>(&cid);
            lock.unlink()?;
            match phase {
                Ok(Some(Phase::Deleting)) => self.unfinished_deletion(&cid),
                // One with a pending note was found before.
                Ok(Some(Phase::Creating)) if !is_pending => {
                    let cx = self.cx;
                    self.found(Kind::Unfinished, &cid, "its creation was interrupted", || {
                        recovery::recover(cx, cid.as_str(), Self::deadline())
                    });
                }
                Ok(None)
                    if !is_pending
                        && atomic::entry_exists(
                            &self.cx.store.record_dir::<NetworkRecord>(&cid),
                        ) =>
                {
                    self.without_record(&cid, &self.cx.store.record_dir::<NetworkRecord>(&cid));
                }
                Ok(_) if is_unacknowledged => {
                    self.unacknowledged("create_network", "delete_network", &cid);
                }
                Ok(_) => {}
                Err(error) => {
                    let next = format!(
                        "restore it from a backup; or move its directory away, and run \
                         `bosh-qemu-cpi network remove {cid}`"
                    );
                    self.for_operator(Kind::Corrupt, &cid, &error.chain(), &next);
                }
            }
        }
        Ok(())
    }

    fn unfinished_deletion(&mut self, cid: &NetworkCid) {
        let cx = self.cx;
        self.found(Kind::Unfinished, cid, "its deletion was interrupted", || {
            match network::delete(cx, cid) {
                // A VM uses it: the delete was refused, and has made the network ready again.
                Err(error)
                    if matches!(error.kind(), ErrorKind::Conflict | ErrorKind::NetworkNotFound) =>
                {
                    Ok(())
                }
                deleted => deleted,
            }
        });
    }

    /// The taps of VMs that run. A tap that was removed takes its VM off the network until
    /// reboot_vm.
    fn plugged(&mut self) -> Result<BTreeSet<LinkName>> {
        let mut plugged = BTreeSet::new();
        for cid in self.cx.store.list::<VmRecord>()? {
            let Ok(Some(vm)) = self.cx.store.read::<VmRecord>(&cid) else { continue };
            let paths = self.cx.store.vm(&cid);
            // `vms` reports a VM whose state cannot be found out.
            let is_on = || matches!(power_state(&paths), Ok(PowerState::On(_)));
            if vm.phase != Phase::Ready || !is_on() {
                continue;
            }
            let Some(_lock) = self.lock_object(Rank::Vm, &cid) else { continue };
            let taps: Vec<_> =
                vm.nics.iter().filter_map(Nic::tap).map(|(tap, _)| tap.clone()).collect();
            let present = apply::existing_links(&taps)?;
            // The VM may have ended meanwhile.
            if !is_on() {
                continue;
            }
            for tap in taps.iter().filter(|tap| !present.contains(tap)) {
                let why = format!("its tap '{tap}' was removed");
                self.for_operator(Kind::Network, &cid, &why, "reboot_vm plugs it in again");
            }
            plugged.extend(present);
        }
        Ok(plugged)
    }

    fn network(&mut self, mut network: HostNetwork, plugged: &BTreeSet<LinkName>) -> Result<()> {
        network.nics.retain(|nic| nic.tap().is_some_and(|(tap, _)| plugged.contains(tap)));
        if self.lacks(&network)?.is_empty() {
            return Ok(());
        }
        // A VM that was deleted meanwhile took its rules along. Now the VMs are locked.
        let _locks = self.lock_vms(&mut network);
        let lacks = self.lacks(&network)?;
        if !lacks.is_empty() {
            let (cx, bridge) = (self.cx, network.segment.bridge.clone());
            let why = format!("network '{}' lacks: {}", network.segment.network, lacks.join("; "));
            self.found(Kind::Network, &bridge, &why, || host::restore(cx, &network));
        }
        Ok(())
    }

    /// What the network lacks, in words. A network that cannot exist as configured is a finding.
    fn lacks(&mut self, network: &HostNetwork) -> Result<Vec<String>> {
        if network.nics.is_empty() && !network.pinned {
            return Ok(Vec::new());
        }
        let bridge = &network.segment.bridge;
        let lack = host::lack(network)?;
        let changes = match lack.changes {
            Ok(changes) => changes,
            Err(error) => {
                self.for_operator(Kind::Network, bridge, &error.report().replace('\n', " "), NEXT);
                return Ok(Vec::new());
            }
        };
        let mut lacks: Vec<_> = changes.iter().map(ToString::to_string).collect();
        lacks.extend(
            lack.filter
                .then(|| "rules of its VMs in the nftables table bosh-qemu-guard".to_owned()),
        );
        if network.pinned
            && !bridge_owners::owned_by(&self.cx.store.state_dir_id()?)?.contains(bridge)
        {
            lacks.push("the mark that keeps its bridge without VMs".to_owned());
        }
        Ok(lacks)
    }

    /// Locks the VMs that no call works on; the NICs of the others are left out of the network.
    fn lock_vms(&mut self, network: &mut HostNetwork) -> Vec<ObjectLock> {
        let (mut locks, mut taps) = (Vec::new(), BTreeSet::new());
        for cid in self.cx.store.list::<VmRecord>().unwrap_or_default() {
            let Some(lock) = self.lock_object(Rank::Vm, &cid) else { continue };
            let Ok(Some(vm)) = self.cx.store.read::<VmRecord>(&cid) else { continue };
            if vm.phase == Phase::Ready
                && matches!(power_state(&self.cx.store.vm(&cid)), Ok(PowerState::On(_)))
            {
                taps.extend(vm.nics.iter().filter_map(Nic::tap).map(|(tap, _)| tap.clone()));
                locks.push(lock);
            }
        }
        network.nics.retain(|nic| nic.tap().is_some_and(|(tap, _)| taps.contains(tap)));
        locks
    }

    /// Bridges that this state directory keeps without a pin: an operator removed the pin's file.
    fn unpinned_bridges(&mut self) -> Result<()> {
        let (cx, owner) = (self.cx, self.cx.store.state_dir_id()?);
        for bridge in bridge_owners::owned_by(&owner)? {
            let Some(lock) = self.lock(Rank::Network, &bridge) else { continue };
            if !cx.store.is_pinned(&bridge) {
                self.found(
                    Kind::Orphan,
                    &bridge,
                    "the bridge is kept for a network that is not pinned",
                    || {
                        bridge_owners::remove_owner(&bridge, &owner)?;
                        apply::release_stray(&bridge).map(drop)
                    },
                );
            }
            lock.unlink()?;
        }
        Ok(())
    }
}
