//! Frames that a hostile guest may send. Only the IPv4 header has a correct checksum, because
//! br_netfilter checks it.

use std::net::{Ipv4Addr, Ipv6Addr};

/// A MAC address.
pub type Mac = [u8; 6];

/// The broadcast MAC address.
pub const BROADCAST: Mac = [0xff; 6];

/// An Ethernet frame with the EtherType `kind`.
pub fn ethernet(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

/// An ARP packet for IPv4 over Ethernet: a request (1) or a reply (2).
pub fn arp(operation: u8, sender: (Mac, &str), target: &str) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, operation];
    let target: Ipv4Addr = target.parse().unwrap();
    let sender_ip: Ipv4Addr = sender.1.parse().unwrap();
    [&head[..], &sender.0, &sender_ip.octets(), &[0; 6], &target.octets()].concat()
}

/// An IPv4 packet with a correct header checksum.
pub fn ip4(from: &str, to: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let (from, to): (Ipv4Addr, Ipv4Addr) = (from.parse().unwrap(), to.parse().unwrap());
    let length = (20 + payload.len() as u16).to_be_bytes();
    let head = [0x45, 0, length[0], length[1], 0, 0, 0, 0, 64, protocol, 0, 0];
    let mut head = [&head[..], &from.octets(), &to.octets()].concat();
    let sum = head.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum::<u32>();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    head[10..12].copy_from_slice(&sum.to_be_bytes());
    [&head[..], payload].concat()
}

/// An IPv6 packet whose next header is `next`.
pub fn ip6(from: &str, to: &str, next: u8, payload: &[u8]) -> Vec<u8> {
    let (from, to): (Ipv6Addr, Ipv6Addr) = (from.parse().unwrap(), to.parse().unwrap());
    let length = (payload.len() as u16).to_be_bytes();
    let head = [0x60, 0, 0, 0, length[0], length[1], next, 255];
    [&head[..], &from.octets(), &to.octets(), payload].concat()
}

/// A fragment of an IPv6 packet to all nodes. `next` is the header that the whole packet begins
/// with, `offset` is in bytes.
pub fn fragment(from: &str, next: u8, offset: u16, more: bool, payload: &[u8]) -> Vec<u8> {
    let place = (offset | u16::from(more)).to_be_bytes();
    ip6(from, "ff02::1", 44, &[&[next, 0, place[0], place[1], 0, 0, 0, 7], payload].concat())
}

/// A UDP datagram.
pub fn udp(from: u16, to: u16) -> Vec<u8> {
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0, 12, 0, 0], b"ping"].concat()
}

/// A TCP segment with `flags`: SYN is 2, ACK is 16.
pub fn tcp(from: u16, to: u16, flags: u8) -> Vec<u8> {
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0; 8], &[0x50, flags, 1, 0, 0, 0, 0, 0]].concat()
}

/// An ICMPv6 message of neighbour discovery, with its target and an option that holds a MAC.
pub fn nd(kind: u8, target: &str, option: Option<(u8, Mac)>) -> Vec<u8> {
    let target: Ipv6Addr = target.parse().unwrap();
    let option = option.map_or(Vec::new(), |(kind, mac)| [&[kind, 1][..], &mac].concat());
    [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &target.octets(), &option].concat()
}

/// An ICMPv6 router solicitation.
pub fn rs(options: &[u8]) -> Vec<u8> {
    [&[133, 0, 0, 0, 0, 0, 0, 0], options].concat()
}
