//! Networks: what those lack that are kept or that running VMs are on, and bridges we keep for nobody.

use std::collections::BTreeSet;

use super::hold::Hold;
use super::{Audit, Kind};
use crate::cid::{Cid, NetworkCid};
use crate::cpi::host_networks::HostNetwork;
use crate::cpi::managed_networks;
use crate::error::{ErrorKind, Result};
use crate::link_name::LinkName;
use crate::net::{apply, kept};
use crate::store::record::{NetworkRecord, Nic};
use crate::store::{Phase, Rank, VmRecord, atomic};
use crate::supervisor::{PowerState, power_state};

const NEXT: &str = "correct what it names; `bosh-qemu-cpi network plan` shows more";

impl Audit<'_> {
    pub(super) fn networks(&mut self) -> Result<()> {
        self.managed()?;
        for (path, error) in self.cpi.store.damaged_pins()? {
            self.unusable(&path.display(), &error);
        }
        let plugged = self.plugged()?;
        match self.cpi.host_networks(&[]) {
            Ok(networks) => {
                networks.into_iter().try_for_each(|network| self.network(network, &plugged))
            }
            Err(error) => {
                self.told(Kind::Network, &"networks", &error.report(), NEXT);
                Ok(())
            }
        }?;
        self.kept_for_nobody()
    }

    /// Managed networks that are half made or half removed, and those that nobody was told of.
    fn managed(&mut self) -> Result<()> {
        for cid in self.cpi.store.list::<NetworkRecord>()? {
            let Some(lock) = self.hold(Rank::Network, managed_networks::bridge(&cid)) else {
                continue;
            };
            let phase = self
                .cpi
                .store
                .read::<NetworkRecord>(&cid)
                .map(|record| record.map(|record| record.phase));
            let noted = self.cpi.has_note(&cid);
            let untold =
                matches!(phase, Ok(Some(Phase::Ready))) && self.is_untold::<NetworkRecord>(&cid);
            lock.unlink()?;
            match phase {
                Ok(Some(Phase::Deleting)) => self.unfinished_removal(&cid),
                // One with a note was found before.
                Ok(Some(Phase::Creating)) if !noted => {
                    let cpi = self.cpi;
                    self.found(Kind::Unfinished, &cid, "its creation was cut short", || {
                        cpi.clear_leftover(cid.as_str(), Self::deadline())
                    });
                }
                Ok(None)
                    if !noted
                        && atomic::entry_exists(
                            &self.cpi.store.record_dir::<NetworkRecord>(&cid),
                        ) =>
                {
                    self.without_record(&cid, &self.cpi.store.record_dir::<NetworkRecord>(&cid));
                }
                Ok(_) if untold => self.untold("create_network", "delete_network", &cid),
                Ok(_) => {}
                Err(error) => {
                    let next = format!(
                        "restore it from a backup; or move its directory away, and `bosh-qemu-cpi network remove {cid}`"
                    );
                    self.told(Kind::Corrupt, &cid, &error.chain(), &next);
                }
            }
        }
        Ok(())
    }

    fn unfinished_removal(&mut self, cid: &NetworkCid) {
        let cpi = self.cpi;
        self.found(Kind::Unfinished, cid, "its removal was cut short", || {
            match cpi.remove_managed(cid) {
                // A VM uses it: so it was refused, and is whole again.
                Err(error)
                    if matches!(error.kind(), ErrorKind::Conflict | ErrorKind::NetworkNotFound) =>
                {
                    Ok(())
                }
                removed => removed,
            }
        });
    }

    /// The taps of VMs that run. One that is not there any more takes its VM off the network until that is rebooted.
    fn plugged(&mut self) -> Result<BTreeSet<LinkName>> {
        let mut plugged = BTreeSet::new();
        for cid in self.cpi.store.list::<VmRecord>()? {
            let Ok(Some(vm)) = self.cpi.store.read::<VmRecord>(&cid) else { continue };
            let paths = self.cpi.store.vm(&cid);
            // Of one that can not be asked, the machines' part tells.
            let is_on = || matches!(power_state(&paths), Ok(PowerState::On(_)));
            if vm.phase != Phase::Ready || !is_on() {
                continue;
            }
            let Some(_lock) = self.idle(Rank::Vm, &cid) else { continue };
            let taps: Vec<_> =
                vm.nics.iter().filter_map(Nic::tap).map(|(tap, _)| tap.clone()).collect();
            let present = apply::present(&taps)?;
            // It may have ended meanwhile.
            if !is_on() {
                continue;
            }
            for tap in taps.iter().filter(|tap| !present.contains(tap)) {
                let why = format!("somebody removed its tap '{tap}'");
                self.told(Kind::Network, &cid, &why, "reboot_vm plugs it in again");
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
        // A VM that went since took its rules along. Now those that are there can not go.
        let _held = self.hold_vms(&mut network);
        let lacks = self.lacks(&network)?;
        if !lacks.is_empty() {
            let (cpi, bridge) = (self.cpi, network.segment.bridge.clone());
            let why = format!("network '{}' lacks: {}", network.segment.network, lacks.join("; "));
            self.found(Kind::Network, &bridge, &why, || cpi.restore_network(&network));
        }
        Ok(())
    }

    /// What the network lacks, in words. One that can not be is told.
    fn lacks(&mut self, network: &HostNetwork) -> Result<Vec<String>> {
        if network.nics.is_empty() && !network.kept {
            return Ok(Vec::new());
        }
        let bridge = &network.segment.bridge;
        let lack = self.cpi.lack(network)?;
        let changes = match lack.changes {
            Ok(changes) => changes,
            Err(error) => {
                self.told(Kind::Network, bridge, &error.report().replace('\n', " "), NEXT);
                return Ok(Vec::new());
            }
        };
        let mut lacks: Vec<_> = changes.iter().map(ToString::to_string).collect();
        lacks.extend(
            lack.guard.then(|| "what its VMs may send, in nft table bosh-qemu-guard".to_owned()),
        );
        if network.kept && !kept::by(&self.cpi.store.state_dir_id()?)?.contains(bridge) {
            lacks.push("the word that it stays without VMs".to_owned());
        }
        Ok(lacks)
    }

    /// Holds the VMs that nobody works on; cards of others are left out of the network.
    fn hold_vms(&mut self, network: &mut HostNetwork) -> Vec<Hold> {
        let (mut held, mut taps) = (Vec::new(), BTreeSet::new());
        for cid in self.cpi.store.list::<VmRecord>().unwrap_or_default() {
            let Some(hold) = self.idle(Rank::Vm, &cid) else { continue };
            let Ok(Some(vm)) = self.cpi.store.read::<VmRecord>(&cid) else { continue };
            if vm.phase == Phase::Ready
                && matches!(power_state(&self.cpi.store.vm(&cid)), Ok(PowerState::On(_)))
            {
                taps.extend(vm.nics.iter().filter_map(Nic::tap).map(|(tap, _)| tap.clone()));
                held.push(hold);
            }
        }
        network.nics.retain(|nic| nic.tap().is_some_and(|(tap, _)| taps.contains(tap)));
        held
    }

    /// Bridges with our word on them, but without a pin: somebody removed that by hand.
    fn kept_for_nobody(&mut self) -> Result<()> {
        let (cpi, owner) = (self.cpi, self.cpi.store.state_dir_id()?);
        for bridge in kept::by(&owner)? {
            let Some(lock) = self.hold(Rank::Network, &bridge) else { continue };
            if !cpi.store.is_pinned(&bridge) {
                self.found(
                    Kind::Orphan,
                    &bridge,
                    "the bridge is kept, and the network it was kept for is gone",
                    || {
                        kept::let_go(&bridge, &owner)?;
                        apply::release_stray(&bridge).map(drop)
                    },
                );
            }
            lock.unlink()?;
        }
        Ok(())
    }
}
