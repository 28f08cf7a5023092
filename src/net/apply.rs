//! Brings the host to the state that a [`Segment`] describes, and plugs taps into its bridge.
//!
//! ```text
//!            no bridge ──ensure──▶ bridge, rules ──plug──▶ … with a tap
//!                ▲                  │      ▲                   │
//!                └─────release──────┘      └─ the tap's fd is closed
//! ```
//! `ensure` observes the kernel's state, has `diff` list what is missing, and makes those changes.
//! If nothing is missing, it costs a few messages. It changes nothing else of the host but
//! `net.ipv4.ip_forward`: that setting stays on, because other programs may have come to need it.
//!
//! Callers hold the network's lock from `ensure` or `plug` until the VM's record is written, and
//! during `release`: the kernel cannot remove a bridge on the condition that it has no port. An
//! operator or another installation may work without the lock. If a link appears or disappears
//! meanwhile, the functions here observe the host again.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use super::change::{Change, Port, Ruleset};
use super::diff::{self, Observed, diff, is_cpi_bridge};
use super::link::{Link, Links};
use super::plan::{Keeper, Segment};
use super::{bridge_owners, firewall, nft, sysctl, tap};
use crate::crash;
use crate::error::{Error, ErrorKind, Result};
use crate::link_name::LinkName;

/// How often the host may change during one call before it fails: once for each step of making a
/// bridge, and again.
const MAX_ATTEMPTS: u32 = 8;

/// A tap that is a port of its bridge.
#[derive(Debug)]
pub struct Plug {
    /// The tap's descriptors, one for each queue. The kernel removes the tap when every copy of
    /// them is closed.
    pub queues: Vec<OwnedFd>,
    /// Descriptors of `/dev/vhost-net`, one for each queue; empty if the host lacks the device.
    pub vhost: Vec<OwnedFd>,
    /// Largest packet that the network carries, bytes. The guest needs the number if it is not
    /// 1500.
    pub mtu: u32,
}

/// Returns what the host lacks for the segment and for those of `ports` that exist, in the order in
/// which to make it. Changes nothing.
///
/// # Errors
/// As [`ensure`].
pub fn missing_changes(segment: &Segment, ports: &[Port]) -> Result<Vec<Change>> {
    diff(segment, &observe(&Links::open()?, segment, ports)?)
}

/// Makes the segment's bridge work, with those of `ports` plugged in that exist. Does nothing if it
/// works already.
///
/// After a failure, what it has made stays; [`release`] removes it.
///
/// # Errors
/// [`ErrorKind::Conflict`] if the bridge or its subnet belongs to another program, with nothing
/// changed; [`ErrorKind::NetworkNotFound`] if the operator's bridge or the uplink does not exist;
/// [`ErrorKind::Host`] for what the kernel refused.
pub fn ensure(segment: &Segment, ports: &[Port]) -> Result<()> {
    retry_while_stale(segment, |links| {
        apply_missing(links, segment, observe(links, segment, ports)?)
    })
    .map(drop)
}

/// Creates the tap `port` with `queues` queues and plugs it into the segment's bridge, after it has
/// made that as [`ensure`] does. Calls `all_vms` if the bridge or its rules are missing: it returns
/// the merged segment of all VMs on the bridge, and their ports. A bridge that another program
/// removed leaves its taps behind, and the rules must cover all VMs.
///
/// # Errors
/// As [`ensure`]; [`ErrorKind::Conflict`] if a link of that name exists.
pub fn plug(
    port: &Port,
    segment: &Segment,
    queues: usize,
    all_vms: impl Fn() -> Result<(Segment, Vec<Port>)>,
) -> Result<Plug> {
    retry_while_stale(segment, |links| {
        let observed = observe(links, segment, &[])?;
        let applied = if observed.bridge.is_some() && observed.rules_current {
            apply_missing(links, segment, observed)?
        } else {
            let (all, ports) = all_vms()?;
            apply_missing(links, &all, observe(links, &all, &ports)?)?
        };
        let Some((observed, bridge)) = applied else { return Ok(None) };
        let name = &port.link;
        let taps = tap::create(name, port.framing, queues)?;
        crash::point!("tap made");
        // Without IPv6 on the tap, the host has no address on this wire and sends the guest no
        // router solicitations. The filter drops what a guest would send to such an address.
        sysctl::prefer(&format!("ipv6/conf/{name}/disable_ipv6"), "1")?;
        for change in diff::plug(segment, &observed, port, Some(tap::host_mac(name)), bridge.mtu) {
            if !links.apply(&change)? {
                return Ok(None);
            }
        }
        crash::point!("tap on its bridge");
        Ok(Some(Plug {
            vhost: tap::open_vhost(queues)?,
            queues: taps,
            mtu: segment.mtu.unwrap_or(bridge.mtu),
        }))
    })
}

/// Removes the segment's bridge and rules, if the CPI made them, no VM's port is on the bridge and
/// it has no owner. Returns whether both are removed.
///
/// # Errors
/// [`ErrorKind::Host`] for what the kernel refused.
pub fn release(segment: &Segment) -> Result<bool> {
    let Keeper::Cpi { uplink, .. } = &segment.keeper else { return Ok(true) };
    let links = Links::open()?;
    let vlan_link = uplink.as_ref().map(diff::vlan_name);
    let vlan_link = vlan_link
        .map(|name| Ok::<_, Error>(links.find(&name)?.map(|link| (name, link))))
        .transpose()?
        .flatten();
    remove(&links, &segment.bridge, vlan_link.as_ref())
}

/// Whether [`release_stray`] would remove anything.
///
/// # Errors
/// As [`release`].
pub fn is_stray(bridge: &LinkName) -> Result<bool> {
    let links = Links::open()?;
    let Some(link) = links.find(bridge)?.filter(|link| is_cpi_bridge(link, bridge)) else {
        return Ok(false);
    };
    Ok(!bridge_owners::has_owner(&link)
        && links.ports(link.index)?.iter().all(diff::is_cpi_vlan_link))
}

/// As [`release`], for a bridge whose segment is in no record.
///
/// # Errors
/// As [`release`].
pub fn release_stray(bridge: &LinkName) -> Result<bool> {
    let links = Links::open()?;
    let Some(link) = links.find(bridge)?.filter(|link| is_cpi_bridge(link, bridge)) else {
        return Ok(true);
    };
    let vlan_link = links.ports(link.index)?.into_iter().find(diff::is_cpi_vlan_link);
    let vlan_link = vlan_link.and_then(|link| Some((LinkName::parse(&link.name).ok()?, link)));
    remove(&links, bridge, vlan_link.as_ref())
}

fn remove(links: &Links, bridge: &LinkName, vlan_link: Option<&(LinkName, Link)>) -> Result<bool> {
    let found = links.find(bridge)?.filter(|link| is_cpi_bridge(link, bridge));
    if let Some(link) = &found {
        let is_vlan_link = |port: &Link| vlan_link.is_some_and(|(_, link)| link == port);
        if bridge_owners::has_owner(link) || !links.ports(link.index)?.iter().all(is_vlan_link) {
            return Ok(false);
        }
    }
    // The kernel waits for RCU grace periods of every CPU, 40 ms for the bridge and 12 ms for the
    // table: remove both at once.
    std::thread::scope(|threads| {
        let rules = threads.spawn(|| firewall::remove_table(bridge));
        let removed =
            found.iter().map(|link| (bridge, link)).chain(vlan_link.iter().map(|(n, l)| (n, l)));
        for (name, link) in removed {
            tracing::info!(link = %name, "removing a link that no VM uses");
            links.delete(name, link.index)?;
            crash::point!("link removed");
        }
        rules.join().expect("no panic")
    })?;
    crash::point!("rules removed");
    Ok(true)
}

/// Returns those of `names` that exist as links.
///
/// # Errors
/// As [`release`].
pub fn existing_links(names: &[LinkName]) -> Result<Vec<LinkName>> {
    let links = Links::open()?;
    let found = names.iter().map(|name| Ok(links.find(name)?.map(|_| name.clone())));
    found.filter_map(Result::transpose).collect()
}

/// Removes a tap that outlived its VM, if it exists.
///
/// # Errors
/// [`ErrorKind::Conflict`] if the link of that name is no tap.
pub fn remove_tap(name: &LinkName) -> Result<()> {
    let links = Links::open()?;
    let Some(link) = links.find(name)? else { return Ok(()) };
    if link.kind.as_deref() != Some("tun") {
        return Err(Error::new(ErrorKind::Conflict, format!("link '{name}' is not a tap")));
    }
    links.delete(name, link.index).map(drop)
}

/// Repeats `attempt` on one socket while it returns `None`: the host changed during the attempt.
fn retry_while_stale<T>(
    segment: &Segment,
    mut attempt: impl FnMut(&Links) -> Result<Option<T>>,
) -> Result<T> {
    let links = Links::open()?;
    for _ in 0..MAX_ATTEMPTS {
        if let Some(done) = attempt(&links)? {
            return Ok(done);
        }
        links.clear_cache();
    }
    Err(Error::new(
        ErrorKind::Conflict,
        format!(
            "gave up on bridge '{}' after {MAX_ATTEMPTS} attempts: \
             another program keeps changing it",
            segment.bridge
        ),
    )
    .hint(format!("find the program: ip monitor link dev {}", segment.bridge)))
}

/// Makes the changes that `observed` calls for. Returns `observed` and the bridge as it works now,
/// or `None` if the host changed meanwhile and the caller must observe it again.
fn apply_missing(
    links: &Links,
    segment: &Segment,
    observed: Observed,
) -> Result<Option<(Observed, Link)>> {
    let changes = match diff(segment, &observed) {
        Ok(changes) => changes,
        // Another program may have made the bridge after it was observed.
        Err(error) => {
            let now = links.find(&segment.bridge)?.map(|link| link.index);
            return if now == observed.bridge.map(|link| link.index) {
                Err(error)
            } else {
                Ok(None)
            };
        }
    };
    for change in &changes {
        let done = match change {
            Change::WriteSysctl { key, value, required: true } => {
                sysctl::ensure(key, value).map(|()| true)
            }
            Change::WriteSysctl { key, value, required: false } => {
                sysctl::prefer(key, value).map(|()| true)
            }
            Change::ReplaceTable(Ruleset(table)) => nft::replace(table).map(|()| true),
            change => {
                tracing::debug!(%change, "changing the host's network");
                links.apply(change)
            }
        };
        if !done? {
            return Ok(None);
        }
        crash::point!("network changed");
    }
    let bridge = match &observed.bridge {
        Some(bridge) if changes.is_empty() => Some(bridge.clone()),
        _ => links.find(&segment.bridge)?,
    };
    Ok(bridge.map(|bridge| (observed, bridge)))
}

/// Observes what `diff` needs to know.
fn observe(links: &Links, segment: &Segment, ports: &[Port]) -> Result<Observed> {
    let mut observed = Observed {
        bridge: links.find(&segment.bridge)?,
        ports: existing_ports(links, ports)?,
        ..Observed::default()
    };
    let Keeper::Cpi { addresses, uplink, .. } = &segment.keeper else {
        return Ok(Observed { rules_current: true, ..observed });
    };
    let index = observed.bridge.as_ref().map(|link| link.index);
    for (at, address) in links.addresses()? {
        if Some(at) == index {
            observed.bridge_addresses.push(address);
        } else {
            observed.other_addresses.push(address);
        }
    }
    if let Some(index) = index {
        let families =
            [addresses.iter().find(|a| a.is_ipv4()), addresses.iter().find(|a| a.is_ipv6())];
        for address in families.into_iter().flatten() {
            observed.routes.extend(links.routes_to(index, address.ip())?);
        }
    }
    match uplink {
        Some(uplink) => {
            observed.upstream = links.find(&uplink.link)?;
            observed.vlan_link = links.find(&diff::vlan_name(uplink))?;
        }
        None if segment.mtu.is_none() && observed.bridge.is_none() => {
            observed.upstream = links.default_route_link()?;
        }
        None => {}
    }
    observed.settings = observed_sysctls(&segment.bridge)?;
    observed.rules_current = firewall::table(segment, &observed.bridge_addresses)
        .map_or(Ok(true), |table| nft::is_current(&table))?;
    Ok(observed)
}

fn existing_ports(links: &Links, ports: &[Port]) -> Result<Vec<(Port, Link)>> {
    let found =
        ports.iter().map(|port| Ok(links.find(&port.link)?.map(|link| (port.clone(), link))));
    found.filter_map(Result::transpose).collect()
}

fn observed_sysctls(bridge: &LinkName) -> Result<BTreeMap<String, String>> {
    let of_bridge =
        ["accept_ra", "disable_ipv6", "accept_dad"].map(|key| format!("ipv6/conf/{bridge}/{key}"));
    let keys = diff::FORWARDING_KEYS.map(str::to_owned).into_iter().chain(of_bridge);
    keys.filter_map(|key| Some(sysctl::read(&key).transpose()?.map(|value| (key, value)))).collect()
}
