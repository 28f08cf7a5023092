//! The networks of this host, with and without VMs: what each lacks, how it is made and removed.
//!
//! A bridge that this program has made is removed with its last VM, unless a pin
//! (`store/pins.rs`) keeps it. What a bridge must be follows from the configuration, the
//! pins and the records of all VMs together.

use std::time::{Duration, Instant};

use crate::cpi::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::link_name::LinkName;
use crate::net::change::{Change, Port};
use crate::net::host_firewalls::{self, Finding};
use crate::net::plan::{self, Keeper, Segment};
use crate::net::{apply as links, bridge_owners, filter, profile::Profile};
use crate::store::record::Nic;
use crate::store::{Phase, Rank, VmRecord};

/// How long to wait for the lock of a bridge. Every call holds it for milliseconds.
const LOCK_TIMEOUT: Duration = Duration::from_secs(20);

/// A bridge, or one VLAN of it, and what uses it.
#[derive(Debug)]
pub struct HostNetwork {
    /// What the bridge must be.
    pub segment: Segment,
    /// Whether a pin keeps it without VMs.
    pub pinned: bool,
    /// Whether the configuration has it.
    pub configured: bool,
    /// Why the configuration, the pins and the VMs contradict each other, if they do.
    pub disagreement: Option<String>,
    /// The NICs of VMs on it, on and off.
    pub nics: Vec<Nic>,
}

/// What a network lacks, and what else on the host interferes with it.
#[derive(Debug)]
pub struct Lack {
    /// The changes that would make it complete, in order; or why none can.
    pub changes: Result<Vec<Change>>,
    /// Whether the filter lacks rules of its VMs' NICs.
    pub filter: bool,
    /// What other firewalls and settings of the host break of what its profile promises.
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

/// The networks of this host that have a bridge, by name. `only` selects some by name; empty means
/// all.
///
/// # Errors
/// [`ErrorKind::BadConfig`] for a network that cannot exist as configured,
/// [`ErrorKind::BadRequest`] for an unknown name.
pub(crate) fn list(cx: &Context, only: &[String]) -> Result<Vec<HostNetwork>> {
    let mut networks = Vec::new();
    for nic in all_nics(cx)? {
        if let Some((_, segment)) = nic.tap() {
            add(&mut networks, segment).nics.push(nic.clone());
        }
    }
    for segment in cx.store.pins()? {
        add(&mut networks, &segment).pinned = true;
    }
    for (name, network) in &cx.config.networks {
        let profile = Profile::load(&network.profile, cx.config.network_profiles_dir.as_deref())
            .map_err(|e| e.during(format!("host network '{name}'")))?;
        if let Some(segment) = plan::configured_segment(name, network, &profile)? {
            add(&mut networks, &segment).configured = true;
        }
    }
    let unknown =
        only.iter().find(|name| networks.iter().all(|network| network.segment.network != **name));
    if let Some(name) = unknown {
        let message = format!("this host has no network '{}' with a bridge", name.escape_debug());
        return Err(Error::new(ErrorKind::BadRequest, message));
    }
    networks.retain(|network| only.is_empty() || only.contains(&network.segment.network));
    networks.sort_by(|one, other| one.segment.network.cmp(&other.segment.network));
    Ok(networks)
}

/// What `network` lacks.
pub(crate) fn lack(network: &HostNetwork) -> Result<Lack> {
    let facts = host_firewalls::observe(&[&network.segment], &network.nics)?;
    let findings = host_firewalls::findings(&network.segment, &network.nics, &facts);
    let changes = match &network.disagreement {
        Some(problem) => Err(Error::new(ErrorKind::BadConfig, problem)),
        None => links::missing_changes(&network.segment, &network.ports()),
    };
    Ok(Lack { changes, filter: filter::is_missing(&network.nics)?, findings })
}

/// The NICs of all VMs except those that are being deleted.
fn all_nics(cx: &Context) -> Result<Vec<Nic>> {
    let vms =
        cx.store.list_readable::<VmRecord>()?.into_iter().filter(|vm| vm.phase != Phase::Deleting);
    Ok(vms.flat_map(|vm| vm.nics).collect())
}

/// Makes `network` complete, with the taps of its VMs plugged in. A bridge of a configured network
/// is pinned.
pub(crate) fn apply(cx: &Context, network: &HostNetwork) -> Result<()> {
    make(cx, network, network.configured && matches!(network.segment.keeper, Keeper::Cpi { .. }))
}

/// Makes `network` complete, and leaves its pin as it is.
pub(crate) fn restore(cx: &Context, network: &HostNetwork) -> Result<()> {
    make(cx, network, false)?;
    let bridge = &network.segment.bridge;
    let _lock = cx.store.short_lock(Rank::Network, bridge, Instant::now() + LOCK_TIMEOUT)?;
    if !cx.store.is_pinned(bridge) && links::existing_links(&network.links())?.is_empty() {
        // The last VM was deleted meanwhile.
        links::release(&network.segment)?;
    }
    Ok(())
}

/// Makes the bridge, the filter rules and the ports of `network`.
fn make(cx: &Context, network: &HostNetwork, pin: bool) -> Result<()> {
    cx.store.prepare()?;
    let bridge = &network.segment.bridge;
    let _lock = cx.store.short_lock(Rank::Network, bridge, Instant::now() + LOCK_TIMEOUT)?;
    // Pinned first: an interrupted call leaves a pin to finish by, not a bridge without one.
    if pin {
        cx.store.pin(&network.segment)?;
    }
    // The filter is in force before a tap is plugged in again.
    filter::add(&network.nics, || all_nics(cx))?;
    links::ensure(&network.segment, &network.ports())?;
    if cx.store.is_pinned(bridge) {
        bridge_owners::add_owner(bridge, &cx.store.state_dir_id()?)?;
    }
    Ok(())
}

/// Unpins `network`, and removes its bridge if no VM runs on it. Returns whether the bridge is
/// gone.
pub(crate) fn remove(cx: &Context, network: &HostNetwork) -> Result<bool> {
    cx.store.prepare()?;
    let bridge = &network.segment.bridge;
    let _lock = cx.store.short_lock(Rank::Network, bridge, Instant::now() + LOCK_TIMEOUT)?;
    bridge_owners::remove_owner(bridge, &cx.store.state_dir_id()?)?;
    let gone = links::release(&network.segment)?;
    cx.store.unpin(bridge)?;
    Ok(gone)
}

/// Logs what on the host interferes with the networks of a new VM. It does not fail the create.
pub(crate) fn warn_of_findings(nics: &[Nic]) {
    let segments: Vec<_> = nics.iter().filter_map(Nic::tap).map(|(_, segment)| segment).collect();
    let facts = match host_firewalls::observe(&segments, nics) {
        Ok(facts) => facts,
        Err(error) => {
            return tracing::debug!(error = error.report(), "cannot look for other firewalls");
        }
    };
    for nic in nics {
        let Some((_, segment)) = nic.tap() else { continue };
        for Finding { cause, cure } in
            host_firewalls::findings(segment, std::slice::from_ref(nic), &facts)
        {
            tracing::warn!(network = segment.network, cure, "{cause}");
        }
    }
}

/// The entry of the segment's bridge and VLAN, made if there is none.
fn add<'a>(networks: &'a mut Vec<HostNetwork>, segment: &Segment) -> &'a mut HostNetwork {
    let key = |segment: &Segment| (segment.bridge.clone(), segment.vlan, segment.isolated);
    let at = match networks.iter().position(|network| key(&network.segment) == key(segment)) {
        Some(at) => at,
        None => {
            let segment = segment.clone();
            networks.push(HostNetwork {
                segment,
                pinned: false,
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
