//! The networks of this host, with and without VMs: what each lacks, making it so, keeping it, letting it go.
//!
//! A network that is ours goes with its last VM, unless it is kept: then a pin (`store::pins`) is in the state directory.
//! What a bridge must be follows from the configuration, the pins and the records of all VMs together.

use std::time::{Duration, Instant};

use super::Cpi;
use crate::error::{Error, ErrorKind, Result};
use crate::link_name::LinkName;
use crate::net::change::{Change, Port};
use crate::net::coexist::{self, Finding};
use crate::net::plan::{self, Keeper, Segment};
use crate::net::{apply, guard, kept, profile::Profile};
use crate::store::record::Nic;
use crate::store::{Phase, Rank, VmRecord};

/// How long to wait for another process that works on the same bridge: each holds the lock for milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// A bridge, or one VLAN of it, and who wants it.
#[derive(Debug)]
pub struct HostNetwork {
    /// What it must be.
    pub segment: Segment,
    /// Whether it stays without VMs.
    pub kept: bool,
    /// Whether the configuration has it.
    pub configured: bool,
    /// Why it can not be what all who want it want of it.
    pub disagreement: Option<String>,
    /// Network cards of VMs that belong on it, running or not.
    pub nics: Vec<Nic>,
}

/// What a network lacks, and what is in its way.
#[derive(Debug)]
pub struct Lack {
    /// What is to be done, in order; or why nothing can be.
    pub changes: Result<Vec<Change>>,
    /// Whether the rules of its VMs' network cards are lost.
    pub guard: bool,
    /// What else on this host keeps its VMs from what its profile promises.
    pub findings: Vec<Finding>,
}

impl HostNetwork {
    fn links(&self) -> Vec<LinkName> {
        self.ports().into_iter().map(|port| port.link).collect()
    }

    fn ports(&self) -> Vec<Port> {
        self.nics.iter().filter_map(Port::of).map(|(port, _)| port).collect()
    }
}

impl Cpi {
    /// All networks of this host but those of QEMU's own stack, by name; those called `only`, if any are.
    ///
    /// # Errors
    /// [`ErrorKind::BadConfig`] for a network that can not be, [`ErrorKind::BadRequest`] if one of `only` is not there.
    pub fn host_networks(&self, only: &[String]) -> Result<Vec<HostNetwork>> {
        let mut networks = Vec::new();
        for nic in self.all_nics()? {
            if let Some((_, segment)) = nic.tap() {
                add(&mut networks, segment).nics.push(nic.clone());
            }
        }
        for segment in self.store.pins()? {
            add(&mut networks, &segment).kept = true;
        }
        for (name, network) in &self.config.networks {
            let profile =
                Profile::load(&network.profile, self.config.network_profiles_dir.as_deref())
                    .map_err(|e| e.during(format!("host network '{name}'")))?;
            if let Some(segment) = plan::standing(name, network, &profile)? {
                add(&mut networks, &segment).configured = true;
            }
        }
        let unknown = only
            .iter()
            .find(|name| networks.iter().all(|network| network.segment.network != **name));
        if let Some(name) = unknown {
            let message = format!("no network '{}' of this host has a bridge", name.escape_debug());
            return Err(Error::new(ErrorKind::BadRequest, message));
        }
        networks.retain(|network| only.is_empty() || only.contains(&network.segment.network));
        networks.sort_by(|one, other| one.segment.network.cmp(&other.segment.network));
        Ok(networks)
    }

    /// What `network` lacks. Changes nothing.
    pub fn lack(&self, network: &HostNetwork) -> Result<Lack> {
        let facts = coexist::observe(&[&network.segment], &network.nics)?;
        let findings = coexist::findings(&network.segment, &network.nics, &facts);
        let changes = match &network.disagreement {
            Some(problem) => Err(Error::new(ErrorKind::BadConfig, problem)),
            None => apply::missing(&network.segment, &network.ports()),
        };
        Ok(Lack { changes, guard: guard::is_lost(&network.nics)?, findings })
    }

    /// The network cards of all VMs but those that are being removed.
    fn all_nics(&self) -> Result<Vec<Nic>> {
        let vms = self
            .store
            .list_readable::<VmRecord>()?
            .into_iter()
            .filter(|vm| vm.phase != Phase::Deleting);
        Ok(vms.flat_map(|vm| vm.nics).collect())
    }

    /// Makes `network` work, with the taps of its VMs plugged in; from now on it stays without VMs, if it is ours and the
    /// configuration has it.
    pub fn apply_network(&self, network: &HostNetwork) -> Result<()> {
        self.make_network(
            network,
            network.configured && matches!(network.segment.keeper, Keeper::Cpi { .. }),
        )
    }

    /// Makes `network` work as it did, kept or not.
    pub(super) fn restore_network(&self, network: &HostNetwork) -> Result<()> {
        self.make_network(network, false)?;
        let bridge = &network.segment.bridge;
        let _lock = self.store.short_lock(Rank::Network, bridge, Instant::now() + PATIENCE)?;
        if !self.store.is_pinned(bridge) && apply::present(&network.links())?.is_empty() {
            // The last VM went while we were at it.
            apply::release(&network.segment)?;
        }
        Ok(())
    }

    fn make_network(&self, network: &HostNetwork, pin: bool) -> Result<()> {
        self.store.prepare()?;
        let bridge = &network.segment.bridge;
        let _lock = self.store.short_lock(Rank::Network, bridge, Instant::now() + PATIENCE)?;
        // Before it is made, so that whoever is interrupted leaves a word of it.
        if pin {
            self.store.pin(&network.segment)?;
        }
        // In force before a tap is on the wire again.
        guard::add(&network.nics, || self.all_nics())?;
        apply::ensure(&network.segment, &network.ports())?;
        if self.store.is_pinned(bridge) {
            kept::keep(bridge, &self.store.state_dir_id()?)?;
        }
        Ok(())
    }

    /// Removes `network` if it is ours and no VM runs on it; else it goes with the last. Whether it is gone.
    pub fn remove_network(&self, network: &HostNetwork) -> Result<bool> {
        self.store.prepare()?;
        let bridge = &network.segment.bridge;
        let _lock = self.store.short_lock(Rank::Network, bridge, Instant::now() + PATIENCE)?;
        kept::let_go(bridge, &self.store.state_dir_id()?)?;
        let gone = apply::release(&network.segment)?;
        self.store.unpin(bridge)?;
        Ok(gone)
    }

    /// Logs what keeps a new VM from the network it was promised. That must not keep the VM from being made.
    pub(super) fn warn_of_findings(nics: &[Nic]) {
        let segments: Vec<_> =
            nics.iter().filter_map(Nic::tap).map(|(_, segment)| segment).collect();
        let facts = match coexist::observe(&segments, nics) {
            Ok(facts) => facts,
            Err(error) => {
                return tracing::debug!(error = error.report(), "can not look for other firewalls");
            }
        };
        for nic in nics {
            let Some((_, segment)) = nic.tap() else { continue };
            for Finding { cause, cure } in
                coexist::findings(segment, std::slice::from_ref(nic), &facts)
            {
                tracing::warn!(network = segment.network, cure, "{cause}");
            }
        }
    }
}

/// The entry that `segment` belongs to. Ports of one bridge may differ in their VLAN.
fn add<'a>(networks: &'a mut Vec<HostNetwork>, segment: &Segment) -> &'a mut HostNetwork {
    let key = |segment: &Segment| (segment.bridge.clone(), segment.vlan, segment.isolated);
    let at = match networks.iter().position(|network| key(&network.segment) == key(segment)) {
        Some(at) => at,
        None => {
            let segment = segment.clone();
            networks.push(HostNetwork {
                segment,
                kept: false,
                configured: false,
                disagreement: None,
                nics: Vec::new(),
            });
            networks.len() - 1
        }
    };
    let network = &mut networks[at];
    if let Err(error) = plan::merge(&mut network.segment, segment) {
        network.disagreement = Some(error.report());
    }
    network
}
