//! Compares what a segment needs with what the host has, and lists the missing [`Change`]s. Pure:
//! the caller passes in what it observed of the host.

use std::collections::BTreeMap;

use ipnetwork::IpNetwork;

use super::ALIAS_PREFIX;
use super::change::{ALL_GROUP_ADDRESSES, Change, LinkSettings, Port, Ruleset};
use super::firewall;
use super::link::Link;
use super::plan::{Keeper, Segment, overlap, subnet};
use crate::error::{Error, ErrorKind, Result};
use crate::link_name::LinkName;
use crate::mac::{MacAddress, digest};
use crate::store::record::VlanLink;

/// Forwarding settings that matter to every segment, below `/proc/sys/net`.
pub(super) const FORWARDING_KEYS: [&str; 2] = [FORWARD_V4, FORWARD_V6];
const FORWARD_V4: &str = "ipv4/ip_forward";
const FORWARD_V6: &str = "ipv6/conf/all/forwarding";

/// What the host has, as far as it concerns one segment.
#[derive(Debug, Default)]
pub(super) struct Observed {
    /// The link with the bridge's name.
    pub bridge: Option<Link>,
    /// Addresses on the bridge.
    pub bridge_addresses: Vec<IpNetwork>,
    /// Addresses on all other links.
    pub other_addresses: Vec<IpNetwork>,
    /// Subnets that the main table routes to the bridge.
    pub routes: Vec<IpNetwork>,
    /// The link towards other hosts: the segment's uplink, or else the link of the default route.
    pub upstream: Option<Link>,
    /// The uplink's VLAN sub-interface.
    pub vlan_link: Option<Link>,
    /// Existing links that are to be ports of the bridge.
    pub ports: Vec<(Port, Link)>,
    /// Existing kernel settings below `/proc/sys/net` and their values.
    pub settings: BTreeMap<String, String>,
    /// Whether the bridge's nftables table is as it must be, or needs not exist.
    pub rules_current: bool,
}

/// Lists the missing changes, in the order in which to make them.
///
/// # Errors
/// As [`super::apply::ensure`]: an impossible segment fails before anything changes.
pub(super) fn diff(segment: &Segment, observed: &Observed) -> Result<Vec<Change>> {
    let mut changes = Vec::new();
    let mtu = match &segment.keeper {
        Keeper::Operator => usable_operator_bridge(segment, observed)?.mtu,
        Keeper::Cpi { addresses, uplink, .. } => {
            ensure_possible(segment, addresses, uplink.as_ref(), observed)?;
            let mtu = bridge_changes(segment, addresses, observed, &mut changes);
            for address in addresses {
                address_changes(segment, *address, observed, &mut changes);
            }
            if let Some(uplink) = uplink {
                vlan_link_changes(segment, uplink, observed, &mut changes);
            }
            forwarding_changes(segment, observed, &mut changes);
            mtu
        }
    };
    for (port, link) in &observed.ports {
        let unplugged = link.controller.is_none()
            || link.controller != observed.bridge.as_ref().map(|bridge| bridge.index);
        if unplugged {
            changes.extend(plug(segment, observed, port, None, mtu));
        } else if link.learning || link.group_forward_mask != ALL_GROUP_ADDRESSES {
            changes.extend(pin_mac(port));
        }
    }
    Ok(changes)
}

/// Lists the changes that make a tap a port of the bridge, whose MTU is `mtu`. The last one
/// switches the tap on, when its isolation, VLAN and forwarding entry are in place.
pub(super) fn plug(
    segment: &Segment,
    observed: &Observed,
    port: &Port,
    mac: Option<MacAddress>,
    mtu: u32,
) -> Vec<Change> {
    let link = &port.link;
    // Never smaller than the bridge's MTU: a bridge shrinks to its smallest port.
    let joined = LinkSettings {
        mac,
        mtu: Some(mtu),
        controller: Some(segment.bridge.clone()),
        ..LinkSettings::default()
    };
    if !segment.isolated && segment.vlan.is_none() && port.pinned_mac.is_none() {
        return vec![Change::SetLink {
            link: link.clone(),
            to: LinkSettings { up: true, ..joined },
        }];
    }
    let mut changes = vec![Change::SetLink { link: link.clone(), to: joined }];
    if segment.isolated {
        changes.push(Change::IsolatePort(link.clone()));
    }
    if let Some(vlan) = segment.vlan {
        let default = observed.bridge.as_ref().and_then(|bridge| bridge.default_vlan);
        let replaces = default.filter(|default| *default != vlan);
        changes.push(Change::SetPortVlan { port: link.clone(), vlan, replaces });
    }
    // After the VLAN: the kernel adds the forwarding entry for the VLANs that the port is on.
    changes.extend(pin_mac(port));
    changes.push(Change::SetLink {
        link: link.clone(),
        to: LinkSettings { up: true, ..LinkSettings::default() },
    });
    changes
}

fn pin_mac(port: &Port) -> Option<Change> {
    port.pinned_mac.map(|mac| Change::PinMac { port: port.link.clone(), mac })
}

fn usable_operator_bridge<'a>(segment: &Segment, observed: &'a Observed) -> Result<&'a Link> {
    let name = &segment.bridge;
    let wrong = |kind, problem: &str, hint: String| {
        Error::new(kind, format!("bridge '{name}' {problem}")).hint(hint)
    };
    let Some(link) = &observed.bridge else {
        let hint = format!("make it: ip link add {name} type bridge && ip link set {name} up");
        return Err(wrong(ErrorKind::NetworkNotFound, "does not exist", hint));
    };
    if link.kind.as_deref() != Some("bridge") {
        let kind = link.kind.as_deref().unwrap_or("hardware");
        let hint = format!(
            "name a bridge that has it as a port: ip link add br0 type bridge && \
             ip link set {name} master br0"
        );
        return Err(wrong(
            ErrorKind::BadConfig,
            &format!("is no bridge but a link of kind '{kind}'"),
            hint,
        ));
    }
    if !link.up {
        return Err(wrong(
            ErrorKind::Conflict,
            "is down",
            format!("switch it on: ip link set {name} up"),
        ));
    }
    if let Some(mtu) = segment.mtu.filter(|mtu| *mtu > link.mtu) {
        let problem = format!(
            "has an MTU of {} bytes, but network '{}' has mtu {mtu}",
            link.mtu, segment.network
        );
        return Err(wrong(ErrorKind::BadConfig, &problem, format!("ip link set {name} mtu {mtu}")));
    }
    if segment.vlan.is_some() && !link.vlan_filtering {
        let hint = format!(
            "ip link set {name} type bridge vlan_filtering 1; if the kernel lacks \
             BRIDGE_VLAN_FILTERING, give the network an uplink in place of the bridge"
        );
        return Err(wrong(ErrorKind::BadConfig, "does not filter VLANs", hint));
    }
    Ok(link)
}

/// Ensures that no link, subnet or setting outside the CPI's control prevents the segment.
fn ensure_possible(
    segment: &Segment,
    addresses: &[IpNetwork],
    uplink: Option<&VlanLink>,
    observed: &Observed,
) -> Result<()> {
    let (name, network) = (&segment.bridge, &segment.network);
    if observed.bridge.as_ref().is_some_and(|link| !is_cpi_bridge(link, name)) {
        return Err(Error::new(
            ErrorKind::Conflict,
            format!("link '{name}' exists, and the CPI did not make it"),
        )
        .hint(format!(
            "name another bridge for network '{network}', or give it the profile 'bridge'"
        )));
    }
    let missing = addresses.iter().filter(|wanted| !observed.bridge_addresses.contains(wanted));
    let mut pairs = missing
        .flat_map(|wanted| observed.other_addresses.iter().map(move |other| (wanted, other)));
    // Two links with one subnet would cut the host off from every machine behind the first.
    if let Some((wanted, other)) = pairs.find(|(wanted, other)| overlap(**wanted, **other)) {
        let problem = format!(
            "address {wanted} for bridge '{name}' overlaps with the host's address {other}"
        );
        return Err(Error::new(ErrorKind::Conflict, problem).hint(format!(
            "choose another subnet; or, for VMs in the host's own subnet, put the host's link into \
             a bridge and give network '{network}' the profile 'bridge'"
        )));
    }
    // IPv6 forwarding is the operator's decision. With it on, the host ignores router
    // advertisements, which may give it its own default route (kernel,
    // `Documentation/networking/ip-sysctl.rst`, accept_ra).
    let routes_v6 = forwards(segment) && addresses.iter().any(IpNetwork::is_ipv6);
    if routes_v6 && observed.settings.get(FORWARD_V6).is_none_or(|value| value != "1") {
        return Err(Error::new(ErrorKind::Host, "this host does not forward IPv6").hint(
            "set accept_ra=2 on links whose routes come from router advertisements, then run \
             sysctl -w net.ipv6.conf.all.forwarding=1",
        ));
    }
    let Some(VlanLink { link, .. }) = uplink else { return Ok(()) };
    if observed.upstream.is_none() {
        return Err(Error::new(
            ErrorKind::NetworkNotFound,
            format!("uplink '{link}' of network '{network}' does not exist"),
        )
        .hint(format!("set networks.{network}.uplink to a link that 'ip link' lists")));
    }
    Ok(())
}

/// Adds the changes for the bridge itself: it exists, carries the CPI's alias, and is up. Returns
/// its MTU.
fn bridge_changes(
    segment: &Segment,
    addresses: &[IpNetwork],
    observed: &Observed,
    changes: &mut Vec<Change>,
) -> u32 {
    let name = &segment.bridge;
    let mac = bridge_mac(name);
    let upstream_mtu = || observed.upstream.as_ref().map_or(super::ETHERNET_MTU, |link| link.mtu);
    // An existing bridge keeps its MTU: its guests have it.
    let mtu =
        segment.mtu.or(observed.bridge.as_ref().map(|link| link.mtu)).unwrap_or_else(upstream_mtu);
    if observed.bridge.is_none() {
        changes.push(Change::AddBridge { name: name.clone(), mac, mtu });
    }
    // These come before the bridge is up: a guest must not be able to give the host addresses and
    // routes.
    // The bridge's table drops router advertisements, too, but for a gateway on a VLAN.
    let has_rules = matches!(segment.keeper, Keeper::Cpi { services: Some(_), .. });
    let mut settings = vec![("accept_ra", "0", !has_rules && !addresses.is_empty())];
    if addresses.iter().any(IpNetwork::is_ipv6) {
        // No other machine has the gateway's address, and VMs need it at once.
        settings.extend([("disable_ipv6", "0", true), ("accept_dad", "0", false)]);
    }
    if matches!(segment.keeper, Keeper::Cpi { uplink: Some(_), .. }) && addresses.is_empty() {
        settings.push(("disable_ipv6", "1", false));
    }
    let has_ipv6 = observed.settings.contains_key(FORWARD_V6);
    for (key, value, required) in settings.into_iter().filter(|_| has_ipv6) {
        let key = format!("ipv6/conf/{name}/{key}");
        sysctl_change(key, value, required, observed, changes);
    }
    let link = observed.bridge.as_ref();
    let network: String = segment.network.chars().take(64).collect();
    let to = LinkSettings {
        alias: link
            .is_none_or(|link| link.alias.is_none())
            .then(|| format!("{ALIAS_PREFIX}{network}")),
        mac: link.filter(|link| link.mac != Some(mac)).map(|_| mac),
        mtu: link.filter(|link| link.mtu != mtu).map(|_| mtu),
        controller: None,
        up: link.is_none_or(|link| !link.up),
    };
    if to != LinkSettings::default() {
        changes.push(Change::SetLink { link: name.clone(), to });
    }
    mtu
}

fn address_changes(
    segment: &Segment,
    address: IpNetwork,
    observed: &Observed,
    changes: &mut Vec<Change>,
) {
    let link = segment.bridge.clone();
    if !observed.bridge_addresses.contains(&address) {
        changes.push(Change::AddAddress { link, address });
    } else if !observed.routes.contains(&subnet(address))
        && observed.bridge.as_ref().is_some_and(|bridge| bridge.up)
    {
        changes.push(Change::AddRoute { link, address });
    }
}

fn vlan_link_changes(
    segment: &Segment,
    uplink: &VlanLink,
    observed: &Observed,
    changes: &mut Vec<Change>,
) {
    let name = vlan_name(uplink);
    if observed.vlan_link.is_none() {
        let VlanLink { link, vlan } = uplink.clone();
        changes.push(Change::AddVlan { name: name.clone(), carrier: link, vlan });
    }
    let joined = observed.vlan_link.as_ref().is_some_and(|tagged| {
        tagged.up
            && tagged.controller.is_some()
            && tagged.controller == observed.bridge.as_ref().map(|bridge| bridge.index)
    });
    if !joined {
        let controller = Some(segment.bridge.clone());
        changes.push(Change::SetLink {
            link: name,
            to: LinkSettings { controller, up: true, ..LinkSettings::default() },
        });
    }
}

/// Adds the changes that let packets pass from the bridge and back, or that stop them.
fn forwarding_changes(segment: &Segment, observed: &Observed, changes: &mut Vec<Change>) {
    let Keeper::Cpi { addresses, .. } = &segment.keeper else { return };
    if forwards(segment) && addresses.iter().any(IpNetwork::is_ipv4) {
        sysctl_change(FORWARD_V4.to_owned(), "1", true, observed, changes);
    }
    if let Some(table) =
        firewall::table(segment, &observed.bridge_addresses).filter(|_| !observed.rules_current)
    {
        changes.push(Change::ReplaceTable(Ruleset(table)));
    }
}

fn forwards(segment: &Segment) -> bool {
    matches!(segment.keeper, Keeper::Cpi { closed: false, .. })
}

fn sysctl_change(
    key: String,
    value: &'static str,
    required: bool,
    observed: &Observed,
    changes: &mut Vec<Change>,
) {
    if observed.settings.get(&key).is_none_or(|is| is != value) {
        changes.push(Change::WriteSysctl { key, value, required });
    }
}

/// Whether the CPI made the bridge. The CPI makes a bridge with its MAC address in one step and
/// sets the alias in the next. After a crash in between, only the MAC address shows whose the
/// bridge is.
pub(super) fn is_cpi_bridge(link: &Link, name: &LinkName) -> bool {
    let marked = link.alias.as_ref().is_some_and(|alias| alias.starts_with(ALIAS_PREFIX));
    link.kind.as_deref() == Some("bridge") && (marked || link.mac == Some(bridge_mac(name)))
}

/// Returns the fixed MAC address of a bridge. Without one, the address would follow the ports, but
/// guests have the gateway's address in their ARP tables.
fn bridge_mac(bridge: &LinkName) -> MacAddress {
    MacAddress::derived(0x02, "bridge", bridge.as_str())
}

/// Returns the name of an uplink's VLAN sub-interface. The prefix `bqv` marks it as made by the
/// CPI; the hash stands for the uplink's name, which may leave no room for the VLAN's number.
pub(super) fn vlan_name(uplink: &VlanLink) -> LinkName {
    const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let hash = digest("vlan", uplink.link.as_str());
    let tail: String =
        hash[..6].iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect();
    LinkName::parse(&format!("bqv{}-{tail}", uplink.vlan)).expect("at most 14 characters")
}

/// Whether a port is such a sub-interface. Only its kind and name show it: a bridge's ports do not
/// name their segment.
pub(super) fn is_cpi_vlan_link(port: &Link) -> bool {
    port.kind.as_deref() == Some("vlan") && port.name.starts_with("bqv")
}

#[cfg(test)]
#[path = "diff_tests.rs"]
mod tests;
