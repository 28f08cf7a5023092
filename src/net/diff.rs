//! What a segment needs and the host has not, as a list of [`Change`]s. Pure: what the host has is handed in.

use std::collections::BTreeMap;

use ipnetwork::IpNetwork;

use super::MARK;
use super::change::{Change, Port, Rules, Settings};
use super::firewall;
use super::link::Link;
use super::plan::{Keeper, Segment, overlap, subnet};
use crate::error::{Error, ErrorKind, Result};
use crate::link_name::LinkName;
use crate::mac::{MacAddress, digest};
use crate::store::record::VlanLink;

/// The kernel switches whose value matters to any segment, below `/proc/sys/net`.
pub(super) const SWITCHES: [&str; 2] = [FORWARD_V4, FORWARD_V6];
const FORWARD_V4: &str = "ipv4/ip_forward";
const FORWARD_V6: &str = "ipv6/conf/all/forwarding";

/// What the host has, as far as it concerns one segment.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// The link of the bridge's name.
    pub bridge: Option<Link>,
    /// Addresses on it.
    pub own: Vec<IpNetwork>,
    /// Addresses on all other links.
    pub foreign: Vec<IpNetwork>,
    /// Subnets that are routed to it.
    pub routes: Vec<IpNetwork>,
    /// The link to the world: the segment's uplink, else that of the default route.
    pub world: Option<Link>,
    /// The uplink's sub-interface.
    pub tagged: Option<Link>,
    /// Links that are to be its ports and exist.
    pub ports: Vec<(Port, Link)>,
    /// Settings below `/proc/sys/net` that exist.
    pub settings: BTreeMap<String, String>,
    /// Whether our table has the rules it is to have, if any.
    pub rules_hold: bool,
}

/// What is missing, in the order in which it can be done.
///
/// # Errors
/// As [`super::apply::ensure`]: what can not be is found before anything is changed.
pub(super) fn diff(segment: &Segment, seen: &Seen) -> Result<Vec<Change>> {
    let mut changes = Vec::new();
    let mtu = match &segment.keeper {
        Keeper::Operator => operators_bridge(segment, seen)?.mtu,
        Keeper::Cpi { addresses, uplink, .. } => {
            check(segment, addresses, uplink.as_ref(), seen)?;
            let mtu = bridge(segment, addresses, seen, &mut changes);
            for address in addresses {
                routed(segment, *address, seen, &mut changes);
            }
            if let Some(uplink) = uplink {
                tagged(segment, uplink, seen, &mut changes);
            }
            forwarding(segment, seen, &mut changes);
            mtu
        }
    };
    for (port, link) in &seen.ports {
        let lost = link.controller.is_none()
            || link.controller != seen.bridge.as_ref().map(|bridge| bridge.index);
        if lost {
            changes.extend(plug(segment, seen, port, None, mtu));
        } else if link.learns {
            changes.extend(bind(port));
        }
    }
    Ok(changes)
}

/// How a tap becomes a port of the bridge, whose largest packet is `mtu`. It is up last, when nothing is amiss any more.
pub(super) fn plug(
    segment: &Segment,
    seen: &Seen,
    port: &Port,
    mac: Option<MacAddress>,
    mtu: u32,
) -> Vec<Change> {
    let link = &port.link;
    // Never smaller than the bridge's: a bridge shrinks to its smallest port.
    let joined = Settings {
        mac,
        mtu: Some(mtu),
        controller: Some(segment.bridge.clone()),
        ..Settings::default()
    };
    if !segment.isolated && segment.vlan.is_none() && port.bound.is_none() {
        return vec![Change::Set { link: link.clone(), to: Settings { up: true, ..joined } }];
    }
    let mut changes = vec![Change::Set { link: link.clone(), to: joined }];
    if segment.isolated {
        changes.push(Change::Isolate(link.clone()));
    }
    if let Some(vlan) = segment.vlan {
        let default = seen.bridge.as_ref().and_then(|bridge| bridge.default_vlan);
        let instead_of = default.filter(|default| *default != vlan);
        changes.push(Change::Tag { port: link.clone(), vlan, instead_of });
    }
    // Behind the VLAN: the kernel enters the address for those that the port is on.
    changes.extend(bind(port));
    changes
        .push(Change::Set { link: link.clone(), to: Settings { up: true, ..Settings::default() } });
    changes
}

fn bind(port: &Port) -> Option<Change> {
    port.bound.map(|mac| Change::Bind { port: port.link.clone(), mac })
}

fn operators_bridge<'a>(segment: &Segment, seen: &'a Seen) -> Result<&'a Link> {
    let name = &segment.bridge;
    let wrong = |kind, problem: &str, hint: String| {
        Error::new(kind, format!("bridge '{name}' {problem}")).hint(hint)
    };
    let Some(link) = &seen.bridge else {
        let hint = format!("make it: ip link add {name} type bridge && ip link set {name} up");
        return Err(wrong(ErrorKind::NetworkNotFound, "does not exist", hint));
    };
    if link.kind.as_deref() != Some("bridge") {
        let kind = link.kind.as_deref().unwrap_or("hardware");
        let hint = format!(
            "make a bridge and put it in: ip link add br0 type bridge && ip link set {name} master br0"
        );
        return Err(wrong(
            ErrorKind::BadConfig,
            &format!("is a link, but no bridge: its kind is {kind}"),
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
            "carries packets of {} bytes, network '{}' wants {mtu}",
            link.mtu, segment.network
        );
        return Err(wrong(ErrorKind::BadConfig, &problem, format!("ip link set {name} mtu {mtu}")));
    }
    if segment.vlan.is_some() && !link.tells_vlans_apart {
        let hint = format!(
            "ip link set {name} type bridge vlan_filtering 1; where the kernel was built without it \
             (BRIDGE_VLAN_FILTERING), give the network an uplink in place of the bridge"
        );
        return Err(wrong(ErrorKind::BadConfig, "does not tell VLANs apart", hint));
    }
    Ok(link)
}

/// That nothing in the way is somebody else's.
fn check(
    segment: &Segment,
    addresses: &[IpNetwork],
    uplink: Option<&VlanLink>,
    seen: &Seen,
) -> Result<()> {
    let (name, network) = (&segment.bridge, &segment.network);
    if seen.bridge.as_ref().is_some_and(|link| !is_ours(link, name)) {
        return Err(Error::new(
            ErrorKind::Conflict,
            format!("link '{name}' exists and is not ours"),
        )
        .hint(format!(
            "name another bridge for network '{network}', or give it the profile 'bridge'"
        )));
    }
    let missing = addresses.iter().filter(|wanted| !seen.own.contains(wanted));
    let mut pairs =
        missing.flat_map(|wanted| seen.foreign.iter().map(move |other| (wanted, other)));
    // Two links with one subnet would cut the host off from whatever is behind the first.
    if let Some((wanted, other)) = pairs.find(|(wanted, other)| overlap(**wanted, **other)) {
        let problem =
            format!("address {wanted} for bridge '{name}' overlaps with the host's own {other}");
        return Err(Error::new(ErrorKind::Conflict, problem).hint(format!(
            "VMs of that subnet belong on a bridge with the host's link: give network '{network}' the profile \
             'bridge'; or choose another subnet"
        )));
    }
    // IPv6 forwarding is the operator's decision: switching it on makes the host deaf to router advertisements, by which
    // it may have its own default route (kernel, `Documentation/networking/ip-sysctl.rst`, accept_ra).
    let routes_v6 = forwards(segment) && addresses.iter().any(IpNetwork::is_ipv6);
    if routes_v6 && seen.settings.get(FORWARD_V6).is_none_or(|value| value != "1") {
        return Err(Error::new(ErrorKind::Host, "this host does not forward IPv6").hint(
            "sysctl -w net.ipv6.conf.all.forwarding=1; first set accept_ra=2 on links whose routes come from router advertisements",
        ));
    }
    let Some(VlanLink { link, .. }) = uplink else { return Ok(()) };
    if seen.world.is_none() {
        return Err(Error::new(
            ErrorKind::NetworkNotFound,
            format!("uplink '{link}' of network '{network}' does not exist"),
        )
        .hint("look with 'ip link'"));
    }
    Ok(())
}

/// The bridge itself: that it is there, ours, and up with its addresses. Its MTU.
fn bridge(
    segment: &Segment,
    addresses: &[IpNetwork],
    seen: &Seen,
    changes: &mut Vec<Change>,
) -> u32 {
    let name = &segment.bridge;
    let mac = pinned_mac(name);
    let of_world = || seen.world.as_ref().map_or(super::ETHERNET_MTU, |world| world.mtu);
    // A bridge that is there keeps its own: its guests were told of it.
    let mtu = segment.mtu.or(seen.bridge.as_ref().map(|link| link.mtu)).unwrap_or_else(of_world);
    if seen.bridge.is_none() {
        changes.push(Change::AddBridge { name: name.clone(), mac, mtu });
    }
    // Before it is up: a guest must not be able to make the host take addresses and routes from it.
    let mut settings = vec![("accept_ra", "0")];
    if addresses.iter().any(IpNetwork::is_ipv6) {
        // Nobody else has the gateway's address, and it is wanted at once.
        settings.extend([("disable_ipv6", "0"), ("accept_dad", "0")]);
    }
    if matches!(segment.keeper, Keeper::Cpi { uplink: Some(_), .. }) && addresses.is_empty() {
        settings.push(("disable_ipv6", "1"));
    }
    let has_ipv6 = seen.settings.contains_key(FORWARD_V6);
    for (key, value) in settings.into_iter().filter(|_| has_ipv6) {
        write(format!("ipv6/conf/{name}/{key}"), value, seen, changes);
    }
    let link = seen.bridge.as_ref();
    let network: String = segment.network.chars().take(64).collect();
    let to = Settings {
        alias: link.is_none_or(|link| link.alias.is_none()).then(|| format!("{MARK}{network}")),
        mac: link.filter(|link| link.mac != Some(mac)).map(|_| mac),
        mtu: link.filter(|link| link.mtu != mtu).map(|_| mtu),
        controller: None,
        up: link.is_none_or(|link| !link.up),
    };
    if to != Settings::default() {
        changes.push(Change::Set { link: name.clone(), to });
    }
    mtu
}

fn routed(segment: &Segment, address: IpNetwork, seen: &Seen, changes: &mut Vec<Change>) {
    let link = segment.bridge.clone();
    if !seen.own.contains(&address) {
        changes.push(Change::AddAddress { link, address });
    } else if !seen.routes.contains(&subnet(address))
        && seen.bridge.as_ref().is_some_and(|bridge| bridge.up)
    {
        changes.push(Change::AddRoute { link, address });
    }
}

fn tagged(segment: &Segment, uplink: &VlanLink, seen: &Seen, changes: &mut Vec<Change>) {
    let name = vlan_name(uplink);
    if seen.tagged.is_none() {
        let VlanLink { link, vlan } = uplink.clone();
        changes.push(Change::AddVlan { name: name.clone(), carrier: link, vlan });
    }
    let joined = seen.tagged.as_ref().is_some_and(|tagged| {
        tagged.up
            && tagged.controller.is_some()
            && tagged.controller == seen.bridge.as_ref().map(|bridge| bridge.index)
    });
    if !joined {
        let controller = Some(segment.bridge.clone());
        changes.push(Change::Set {
            link: name,
            to: Settings { controller, up: true, ..Settings::default() },
        });
    }
}

/// What it takes for packets to pass from the bridge and back, or for none to.
fn forwarding(segment: &Segment, seen: &Seen, changes: &mut Vec<Change>) {
    let Keeper::Cpi { addresses, .. } = &segment.keeper else { return };
    if forwards(segment) && addresses.iter().any(IpNetwork::is_ipv4) {
        write(FORWARD_V4.to_owned(), "1", seen, changes);
    }
    if let Some(table) = firewall::table(segment, &seen.own).filter(|_| !seen.rules_hold) {
        changes.push(Change::Rules(Rules(table)));
    }
}

fn forwards(segment: &Segment) -> bool {
    matches!(segment.keeper, Keeper::Cpi { closed: false, .. })
}

fn write(key: String, value: &'static str, seen: &Seen, changes: &mut Vec<Change>) {
    if seen.settings.get(&key).is_none_or(|is| is != value) {
        changes.push(Change::Write { key, value });
    }
}

/// A bridge is made with its address in one step and marked in the next; whoever died in between left one that only
/// the address tells to be ours.
pub(super) fn is_ours(link: &Link, name: &LinkName) -> bool {
    let marked = link.alias.as_ref().is_some_and(|alias| alias.starts_with(MARK));
    link.kind.as_deref() == Some("bridge") && (marked || link.mac == Some(pinned_mac(name)))
}

/// Set by hand, so that it does not follow the ports: guests have the gateway's address in their ARP tables.
fn pinned_mac(bridge: &LinkName) -> MacAddress {
    MacAddress::derived(0x02, "bridge", bridge.as_str())
}

/// The sub-interface of an uplink. Its name says that it is ours; the uplink's own may leave no room for a VLAN's number.
pub(super) fn vlan_name(uplink: &VlanLink) -> LinkName {
    const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let hash = digest("vlan", uplink.link.as_str());
    let tail: String =
        hash[..6].iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect();
    LinkName::parse(&format!("bqv{}-{tail}", uplink.vlan)).expect("at most 14 characters")
}

/// Whether a port is such a sub-interface. Nothing else tells: a bridge's ports do not say which segment they are for.
pub(super) fn is_our_vlan(port: &Link) -> bool {
    port.kind.as_deref() == Some("vlan") && port.name.starts_with("bqv")
}

#[cfg(test)]
#[path = "diff_tests.rs"]
mod tests;
