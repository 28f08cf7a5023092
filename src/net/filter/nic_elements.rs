//! Builds a NIC's set elements from its record. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

use ipnetwork::IpNetwork;

use super::super::nft::{Element, Part, Set};
use super::rules::*;
use crate::link_name::LinkName;
use crate::mac::MacAddress;
use crate::store::nic_rules::{Admission, Forward, NicRules};
use crate::store::record::{Keeper, Nic, Segment};

/// Elements of one set.
#[derive(Debug)]
pub(super) struct SetElements {
    pub set: Set,
    pub elements: Vec<Element>,
}

/// Returns the elements of a NIC by set: those of the `bridge` table, and those of the `inet`
/// table. A NIC without a tap or without rules has none.
pub(super) fn elements_of(nic: &Nic) -> (Vec<SetElements>, Vec<SetElements>) {
    let (Some((tap, segment)), Some(rules)) = (nic.tap(), &nic.rules) else {
        return Default::default();
    };
    let tap = Part::Link(tap.clone());
    let only = |set: Set, holds: bool| set_elements(set, holds.then(|| vec![tap.clone()]));
    let mut bridge = vec![only(TAPS, true), only(ROAMING, rules.addresses.is_empty())];
    if rules.anti_spoof {
        bridge.push(only(GUARDED, true));
        bridge.extend(anti_spoof(&tap, nic.mac, rules));
    }
    let mut inet = vec![only(TAPS, true)];
    inet.extend(forwards(rules));
    if let Some(admits) = &rules.admits {
        bridge.push(only(GROUPED, true));
        bridge.extend(admitted(&tap, admits));
        inet.extend(masked(segment, &rules.addresses, admits));
    }
    (
        bridge.into_iter().filter(has_elements).collect(),
        inet.into_iter().filter(has_elements).collect(),
    )
}

fn has_elements(members: &SetElements) -> bool {
    !members.elements.is_empty()
}

fn set_elements(set: Set, keys: impl IntoIterator<Item = Vec<Part>>) -> SetElements {
    SetElements { set, elements: keys.into_iter().map(Element::new).collect() }
}

/// Returns the source addresses that a guest may use.
fn anti_spoof(tap: &Part, mac: MacAddress, rules: &NicRules) -> [SetElements; 5] {
    let known =
        outermost(rules.addresses.iter().chain(&rules.allowed).copied().chain([link_local(mac)]));
    let key = |subnet: &IpNetwork| {
        let is_single = subnet.prefix() == if subnet.is_ipv4() { 32 } else { 128 };
        let last = if is_single { Part::Ip(subnet.ip()) } else { Part::Subnet(*subnet) };
        vec![tap.clone(), Part::Mac(mac), last]
    };
    let of = |set, v4: bool, one: bool| {
        let fits = |key: &Vec<Part>| matches!(key[2], Part::Ip(_)) == one;
        set_elements(
            set,
            known.iter().filter(|subnet| subnet.is_ipv4() == v4).map(key).filter(fits),
        )
    };
    [
        set_elements(MACS, [vec![tap.clone(), Part::Mac(mac)]]),
        of(ADDRESSES4, true, true),
        of(BLOCKS4, true, false),
        of(ADDRESSES6, false, true),
        of(BLOCKS6, false, false),
    ]
}

/// Returns the link-local address that a guest's kernel gives itself (RFC 4291, appendix A).
/// Neighbour discovery needs it.
fn link_local(mac: MacAddress) -> IpNetwork {
    let [a, b, c, d, e, f] = mac.octets();
    let tail = [a ^ 2, b, c, 0xff, 0xfe, d, e, f];
    let mut octets = [0; 16];
    octets[..2].copy_from_slice(&[0xfe, 0x80]);
    octets[8..].copy_from_slice(&tail);
    IpAddr::V6(Ipv6Addr::from(octets)).into()
}

/// Returns the subnets without those inside another: ranges in one set must not overlap.
fn outermost(subnets: impl Iterator<Item = IpNetwork>) -> BTreeSet<IpNetwork> {
    let all: BTreeSet<_> = subnets.map(subnet_of).collect();
    let is_subnet_of =
        |one: &IpNetwork, other: &IpNetwork| one != other && other.contains(one.ip());
    all.iter().filter(|one| !all.iter().any(|other| is_subnet_of(one, other))).copied().collect()
}

/// Returns the subnet of an address with a prefix.
fn subnet_of(address: IpNetwork) -> IpNetwork {
    IpNetwork::new(address.network(), address.prefix())
        .expect("the prefix of an address fits its subnet")
}

/// Returns the sources that may open connections to the tap.
fn admitted(tap: &Part, admits: &[Admission]) -> [SetElements; 4] {
    let head = std::slice::from_ref(tap);
    let of =
        |set, v4: bool, ported: bool| set_elements(set, admission_keys(head, admits, v4, ported));
    [
        of(PORTS4, true, true),
        of(PROTOCOLS4, true, false),
        of(PORTS6, false, true),
        of(PROTOCOLS6, false, false),
    ]
}

/// Returns the same for each of its addresses, if the host is the VM's gateway and may masquerade
/// the sender.
fn masked(segment: &Segment, addresses: &[IpNetwork], admits: &[Admission]) -> Vec<SetElements> {
    let gateway = matches!(&segment.keeper, Keeper::Cpi { addresses, .. } if !addresses.is_empty());
    let prefix = |block: &IpNetwork| masked_key_prefix(&segment.bridge, *block);
    let prefixes = |v4: bool| {
        addresses.iter().filter(move |block| gateway && block.is_ipv4() == v4).map(prefix)
    };
    let of = |set, v4: bool, ported: bool| {
        set_elements(
            set,
            prefixes(v4)
                .flat_map(|prefix| admission_keys(&prefix, admits, v4, ported))
                .collect::<Vec<_>>(),
        )
    };
    vec![
        set_elements(MASKED4, prefixes(true)),
        set_elements(MASKED6, prefixes(false)),
        of(MASKED_PORTS4, true, true),
        of(MASKED_PORTS6, false, true),
        of(MASKED_PROTOCOLS4, true, false),
        of(MASKED_PROTOCOLS6, false, false),
    ]
}

/// Returns the first parts of the keys of [`masked`].
pub(super) fn masked_key_prefix(bridge: &LinkName, block: IpNetwork) -> Vec<Part> {
    vec![Part::Link(bridge.clone()), Part::Subnet(subnet_of(block))]
}

/// Returns the keys that begin with `head` and continue with an admitted source: by whole
/// protocols, or by ports if `ported`.
fn admission_keys(head: &[Part], admits: &[Admission], v4: bool, ported: bool) -> Vec<Vec<Part>> {
    let fits = |admission: &&Admission| {
        admission.source.is_ipv4() == v4 && admission.ports.is_some() == ported
    };
    let chosen: Vec<_> = admits.iter().filter(fits).collect();
    let tails = if ported { by_port(&chosen) } else { by_protocol(&chosen) };
    tails.into_iter().map(|tail| [head, &tail].concat()).collect()
}

fn by_port(admits: &[&Admission]) -> Vec<Vec<Part>> {
    let mut protocols: BTreeMap<u8, Vec<(IpNetwork, Range)>> = BTreeMap::new();
    for admission in admits {
        let (first, last) = admission.ports.expect("chosen by that");
        let range = (u32::from(first), u32::from(last));
        protocols
            .entry(admission.protocols.0)
            .or_default()
            .push((subnet_of(admission.source), range));
    }
    let key = |protocol, (source, (first, last)): (IpNetwork, Range)| {
        let ports = Part::Ports(first as u16, last as u16);
        vec![Part::Subnet(source), Part::Protocols(protocol, protocol), ports]
    };
    protocols
        .iter()
        .flat_map(|(protocol, wanted)| disjoint(wanted).into_iter().map(|e| key(*protocol, e)))
        .collect()
}

fn by_protocol(admits: &[&Admission]) -> Vec<Vec<Part>> {
    let range = |(first, last): (u8, u8)| (u32::from(first), u32::from(last));
    let wanted: Vec<_> = admits
        .iter()
        .map(|admission| (subnet_of(admission.source), range(admission.protocols)))
        .collect();
    let key = |(source, (first, last)): (IpNetwork, Range)| {
        vec![Part::Subnet(source), Part::Protocols(first as u8, last as u8)]
    };
    disjoint(&wanted).into_iter().map(key).collect()
}

/// First and last number.
type Range = (u32, u32);

/// Splits sources and numbers into elements that do not overlap, as a set of ranges requires. Two
/// subnets are disjoint or one contains the other. So each element leaves out what the larger
/// subnets around it admit.
fn disjoint(wanted: &[(IpNetwork, Range)]) -> Vec<(IpNetwork, Range)> {
    let sources: BTreeSet<_> = wanted.iter().map(|(source, _)| *source).collect();
    let mut elements = Vec::new();
    for source in sources {
        let of = |fits: &dyn Fn(&IpNetwork) -> bool| {
            merge_ranges(
                wanted.iter().filter(|(other, _)| fits(other)).map(|(_, range)| *range).collect(),
            )
        };
        let around = of(&|other| {
            *other != source && other.contains(source.ip()) && other.prefix() < source.prefix()
        });
        let own = of(&|other| *other == source);
        elements.extend(
            own.into_iter().flat_map(|range| subtract(range, &around)).map(|range| (source, range)),
        );
    }
    elements
}

/// Merges ranges into ascending ranges with gaps between.
fn merge_ranges(mut ranges: Vec<Range>) -> Vec<Range> {
    ranges.sort_unstable();
    let mut merged: Vec<Range> = Vec::new();
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(before) if first <= before.1 + 1 => before.1 = before.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    merged
}

/// Returns the parts of `range` outside `holes`, which are merged.
fn subtract(range: Range, holes: &[Range]) -> Vec<Range> {
    let (mut next, mut left) = (range.0, Vec::new());
    for (first, last) in holes.iter().filter(|hole| hole.1 >= range.0 && hole.0 <= range.1) {
        if *first > next {
            left.push((next, first - 1));
        }
        next = last + 1;
    }
    if next <= range.1 {
        left.push((next, range.1));
    }
    left
}

fn forwards(rules: &NicRules) -> [SetElements; 4] {
    let of = |set, v4: bool, addressed: bool| {
        let fits = |forward: &&Forward| {
            forward.to.is_ipv4() == v4 && forward.address.is_some() == addressed
        };
        SetElements {
            set,
            elements: rules.forwards.iter().filter(fits).flat_map(forward_elements).collect(),
        }
    };
    [
        of(FORWARDS4, true, false),
        of(FORWARDS_AT4, true, true),
        of(FORWARDS6, false, false),
        of(FORWARDS_AT6, false, true),
    ]
}

fn forward_elements(forward: &Forward) -> impl Iterator<Item = Element> {
    let Forward { address, protocol, host, to, guest, count } = *forward;
    (0..count).map(move |n| {
        let port = |first: u16| Part::Ports(first.saturating_add(n), first.saturating_add(n));
        let key = address
            .map(Part::Ip)
            .into_iter()
            .chain([Part::Protocols(protocol, protocol), port(host)])
            .collect();
        Element { key, data: vec![Part::Ip(to), port(guest)] }
    })
}

/// Returns a forward's target address from its data: an address, and a port padded to four bytes.
pub(super) fn forward_target(data: &[u8]) -> Option<IpAddr> {
    let (address, _port) = data.split_at_checked(data.len().checked_sub(4)?)?;
    let v4 = <[u8; 4]>::try_from(address).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(address).map(IpAddr::from)).ok()
}

#[cfg(test)]
#[path = "nic_elements_tests.rs"]
mod tests;
