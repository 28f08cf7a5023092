//! From a network card's record to the elements that stand for it. Pure.

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
pub(super) struct Members {
    pub set: Set,
    pub elements: Vec<Element>,
}

/// The elements of a card, by set: those of the bridges' table, and those of the host's IP. None for a card without
/// a tap or without rules.
pub(super) fn of_nic(nic: &Nic) -> (Vec<Members>, Vec<Members>) {
    let (Some((tap, segment)), Some(rules)) = (nic.tap(), &nic.rules) else {
        return Default::default();
    };
    let tap = Part::Link(tap.clone());
    let only = |set: Set, holds: bool| members(set, holds.then(|| vec![tap.clone()]));
    let mut bridge = vec![only(TAPS, true), only(ROAMING, rules.addresses.is_empty())];
    if rules.anti_spoof {
        bridge.push(only(GUARDED, true));
        bridge.extend(itself(&tap, nic.mac, rules));
    }
    let mut inet = vec![only(TAPS, true)];
    inet.extend(forwards(rules));
    if let Some(admits) = &rules.admits {
        bridge.push(only(GROUPED, true));
        bridge.extend(admitted(&tap, admits));
        inet.extend(masked(segment, &rules.addresses, admits));
    }
    (bridge.into_iter().filter(some).collect(), inet.into_iter().filter(some).collect())
}

fn some(members: &Members) -> bool {
    !members.elements.is_empty()
}

fn members(set: Set, keys: impl IntoIterator<Item = Vec<Part>>) -> Members {
    Members { set, elements: keys.into_iter().map(Element::of).collect() }
}

/// What a guest may say that it is.
fn itself(tap: &Part, mac: MacAddress, rules: &NicRules) -> [Members; 5] {
    let known =
        widest(rules.addresses.iter().chain(&rules.allowed).copied().chain([link_local(mac)]));
    let key = |subnet: &IpNetwork| {
        let is_one = subnet.prefix() == if subnet.is_ipv4() { 32 } else { 128 };
        let last = if is_one { Part::Ip(subnet.ip()) } else { Part::Subnet(*subnet) };
        vec![tap.clone(), Part::Mac(mac), last]
    };
    let of = |set, v4: bool, one: bool| {
        let fits = |key: &Vec<Part>| matches!(key[2], Part::Ip(_)) == one;
        members(set, known.iter().filter(|subnet| subnet.is_ipv4() == v4).map(key).filter(fits))
    };
    [
        members(MACS, [vec![tap.clone(), Part::Mac(mac)]]),
        of(ADDRESSES4, true, true),
        of(BLOCKS4, true, false),
        of(ADDRESSES6, false, true),
        of(BLOCKS6, false, false),
    ]
}

/// The address that a guest's kernel gives itself (RFC 4291, appendix A): without it, no neighbour is found.
fn link_local(mac: MacAddress) -> IpNetwork {
    let [a, b, c, d, e, f] = mac.octets();
    let tail = [a ^ 2, b, c, 0xff, 0xfe, d, e, f];
    let mut octets = [0; 16];
    octets[..2].copy_from_slice(&[0xfe, 0x80]);
    octets[8..].copy_from_slice(&tail);
    IpAddr::V6(Ipv6Addr::from(octets)).into()
}

/// Without those that lie in another: ranges in one set must not overlap.
fn widest(subnets: impl Iterator<Item = IpNetwork>) -> BTreeSet<IpNetwork> {
    let all: BTreeSet<_> = subnets.map(whole).collect();
    let lies_in = |one: &IpNetwork, other: &IpNetwork| one != other && other.contains(one.ip());
    all.iter().filter(|one| !all.iter().any(|other| lies_in(one, other))).copied().collect()
}

/// The subnet of an address with a prefix.
fn whole(address: IpNetwork) -> IpNetwork {
    IpNetwork::new(address.network(), address.prefix())
        .expect("the prefix of an address fits its subnet")
}

/// Who may begin to speak to the tap.
fn admitted(tap: &Part, admits: &[Admission]) -> [Members; 4] {
    let head = std::slice::from_ref(tap);
    let of = |set, v4: bool, ported: bool| members(set, keys(head, admits, v4, ported));
    [
        of(PORTS4, true, true),
        of(PROTOCOLS4, true, false),
        of(PORTS6, false, true),
        of(PROTOCOLS6, false, false),
    ]
}

/// The same for each of its addresses, where the host is its gateway and can have masqueraded who speaks.
fn masked(segment: &Segment, addresses: &[IpNetwork], admits: &[Admission]) -> Vec<Members> {
    let gateway = matches!(&segment.keeper, Keeper::Cpi { addresses, .. } if !addresses.is_empty());
    let place = |block: &IpNetwork| place(&segment.bridge, *block);
    let places = |v4: bool| {
        addresses.iter().filter(move |block| gateway && block.is_ipv4() == v4).map(place)
    };
    let of = |set, v4: bool, ported: bool| {
        members(
            set,
            places(v4).flat_map(|place| keys(&place, admits, v4, ported)).collect::<Vec<_>>(),
        )
    };
    vec![
        members(MASKED4, places(true)),
        members(MASKED6, places(false)),
        of(MASKED_PORTS4, true, true),
        of(MASKED_PORTS6, false, true),
        of(MASKED_PROTOCOLS4, true, false),
        of(MASKED_PROTOCOLS6, false, false),
    ]
}

/// How the keys of [`masked`] begin.
pub(super) fn place(bridge: &LinkName, block: IpNetwork) -> Vec<Part> {
    vec![Part::Link(bridge.clone()), Part::Subnet(whole(block))]
}

/// The keys of a set that begin with `head` and then name who may speak: by whole protocols, or by `ported` ones.
fn keys(head: &[Part], admits: &[Admission], v4: bool, ported: bool) -> Vec<Vec<Part>> {
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
        protocols.entry(admission.protocols.0).or_default().push((whole(admission.source), range));
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
        .map(|admission| (whole(admission.source), range(admission.protocols)))
        .collect();
    let key = |(source, (first, last)): (IpNetwork, Range)| {
        vec![Part::Subnet(source), Part::Protocols(first as u8, last as u8)]
    };
    disjoint(&wanted).into_iter().map(key).collect()
}

/// First and last number.
type Range = (u32, u32);

/// The same sources and numbers in elements that do not overlap, as a set of ranges wants them. Subnets lie in each
/// other or apart, so it is enough to leave out of each what the subnets around it have.
fn disjoint(wanted: &[(IpNetwork, Range)]) -> Vec<(IpNetwork, Range)> {
    let sources: BTreeSet<_> = wanted.iter().map(|(source, _)| *source).collect();
    let mut elements = Vec::new();
    for source in sources {
        let of = |fits: &dyn Fn(&IpNetwork) -> bool| {
            merged(
                wanted.iter().filter(|(other, _)| fits(other)).map(|(_, range)| *range).collect(),
            )
        };
        let around = of(&|other| {
            *other != source && other.contains(source.ip()) && other.prefix() < source.prefix()
        });
        let own = of(&|other| *other == source);
        elements.extend(
            own.into_iter().flat_map(|range| without(range, &around)).map(|range| (source, range)),
        );
    }
    elements
}

/// The same numbers in ascending ranges with gaps between.
fn merged(mut ranges: Vec<Range>) -> Vec<Range> {
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

/// What of `range` is in none of `holes`, which are merged.
fn without(range: Range, holes: &[Range]) -> Vec<Range> {
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

fn forwards(rules: &NicRules) -> [Members; 4] {
    let of = |set, v4: bool, addressed: bool| {
        let fits = |forward: &&Forward| {
            forward.to.is_ipv4() == v4 && forward.address.is_some() == addressed
        };
        Members {
            set,
            elements: rules.forwards.iter().filter(fits).flat_map(port_by_port).collect(),
        }
    };
    [
        of(FORWARDS4, true, false),
        of(FORWARDS_AT4, true, true),
        of(FORWARDS6, false, false),
        of(FORWARDS_AT6, false, true),
    ]
}

fn port_by_port(forward: &Forward) -> impl Iterator<Item = Element> {
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

/// Where a forward leads, out of its data: an address and a port, filled up to four bytes.
pub(super) fn target(data: &[u8]) -> Option<IpAddr> {
    let (address, _port) = data.split_at_checked(data.len().checked_sub(4)?)?;
    let v4 = <[u8; 4]>::try_from(address).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(address).map(IpAddr::from)).ok()
}

#[cfg(test)]
#[path = "elements_tests.rs"]
mod tests;
