//! Sets and maps: their types, and their elements in the kernel's encoding.
//!
//! A key is the concatenation of its parts, each padded to four bytes (`nft_set_desc_concat`). Sets
//! of single keys are hash tables. In sets of ranges, every part of a key has a first and a last
//! value (`nft_set_pipapo`).

use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_bindings::nftables::SetFlags;

use crate::link_name::LinkName;
use crate::mac::MacAddress;

/// A set, or a map if it has data.
#[derive(Debug, Clone, Copy)]
pub(in crate::net) struct Set {
    pub name: &'static str,
    /// Types of the key's parts.
    pub key: &'static [DataType],
    /// Types of the data that a map has for a key; empty for a set.
    pub data: &'static [DataType],
    pub kind: SetKind,
}

/// How a set stores its keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::net) enum SetKind {
    /// Single keys.
    Exact,
    /// Ranges: each part of a key has a first and a last value. Ranges may not overlap.
    Interval,
    /// Keys that packets add, and that expire.
    Dynamic {
        /// Seconds from the last packet to the key's removal.
        timeout_seconds: u32,
        /// Largest number of keys.
        size: u32,
    },
}

/// The type of a part of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::net) enum DataType {
    Link,
    Mac,
    Ip4,
    Ip6,
    Protocol,
    Port,
}

impl DataType {
    /// Returns nft's name and number of the type (`nft describe`, libnftables `datatype.h`), and
    /// its bytes.
    fn nft_type(self) -> (&'static str, u32, u32) {
        match self {
            Self::Link => ("ifname", 41, 16),
            Self::Mac => ("ether_addr", 9, 6),
            Self::Ip4 => ("ipv4_addr", 7, 4),
            Self::Ip6 => ("ipv6_addr", 8, 16),
            Self::Protocol => ("inet_proto", 12, 1),
            Self::Port => ("inet_service", 13, 2),
        }
    }
}

/// Returns the number of a concatenated type: six bits for each part (libnftables
/// `concat_subtype_add`).
pub(super) fn type_number(parts: &[DataType]) -> u32 {
    parts.iter().fold(0, |number, part| number << 6 | part.nft_type().1)
}

/// Returns the bytes of each part.
pub(super) fn sizes(parts: &[DataType]) -> impl Iterator<Item = u32> {
    parts.iter().map(|part| part.nft_type().2)
}

/// Returns the bytes of all parts, each padded.
pub(super) fn length(parts: &[DataType]) -> u32 {
    sizes(parts).map(|size| size.next_multiple_of(4)).sum()
}

impl Set {
    /// Makes a set of single keys.
    pub const fn exact(name: &'static str, key: &'static [DataType]) -> Self {
        Self { name, key, data: &[], kind: SetKind::Exact }
    }

    /// Makes a set of ranges.
    pub const fn interval(name: &'static str, key: &'static [DataType]) -> Self {
        Self { name, key, data: &[], kind: SetKind::Interval }
    }

    pub(super) fn flags(&self) -> u32 {
        let kind = match self.kind {
            SetKind::Exact => 0,
            SetKind::Interval => SetFlags::Interval as u32,
            SetKind::Dynamic { .. } => SetFlags::Timeout as u32 | SetFlags::Eval as u32,
        };
        let concatenated = if self.key.len() > 1 { SetFlags::Concat as u32 } else { 0 };
        let map = if self.data.is_empty() { 0 } else { SetFlags::Map as u32 };
        kind | concatenated | map
    }
}

/// One part of an element.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::net) enum Part {
    Link(LinkName),
    Mac(MacAddress),
    Ip(IpAddr),
    Subnet(IpNetwork),
    Protocols(u8, u8),
    Ports(u16, u16),
}

/// A key, and the data a map has for it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::net) struct Element {
    pub key: Vec<Part>,
    pub data: Vec<Part>,
}

impl Element {
    pub fn new(key: Vec<Part>) -> Self {
        Self { key, data: Vec::new() }
    }
}

/// An element in the kernel's encoding.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::net) struct RawElement {
    /// First value of the key.
    pub first: Vec<u8>,
    /// Last value of the key, in a set of ranges.
    pub last: Vec<u8>,
    /// The data a map has for the key.
    pub data: Vec<u8>,
}

impl Element {
    /// Encodes the element for the kernel.
    pub fn encode(&self) -> RawElement {
        let (first, last) = bytes(&self.key);
        RawElement { first, last, data: bytes(&self.data).0 }
    }
}

/// Encodes the first and the last value of a key.
fn bytes(parts: &[Part]) -> (Vec<u8>, Vec<u8>) {
    let (mut first, mut last) = (Vec::new(), Vec::new());
    for part in parts {
        let (from, to) = part.bytes();
        for (key, value) in [(&mut first, from), (&mut last, to)] {
            key.extend_from_slice(&value);
            key.resize(key.len().next_multiple_of(4), 0);
        }
    }
    (first, last)
}

impl Part {
    fn bytes(&self) -> (Vec<u8>, Vec<u8>) {
        match self {
            Self::Link(name) => single(link_name_bytes(name)),
            Self::Mac(mac) => single(mac.octets().to_vec()),
            Self::Ip(ip) => single(octets(*ip)),
            Self::Subnet(subnet) => (octets(subnet.network()), octets(subnet.broadcast())),
            Self::Protocols(first, last) => (vec![*first], vec![*last]),
            Self::Ports(first, last) => (first.to_be_bytes().to_vec(), last.to_be_bytes().to_vec()),
        }
    }
}

fn single(value: Vec<u8>) -> (Vec<u8>, Vec<u8>) {
    (value.clone(), value)
}

/// Returns all 16 bytes of a link's name: a shorter value would match as a prefix.
pub(super) fn link_name_bytes(name: &LinkName) -> Vec<u8> {
    let mut bytes = name.as_str().as_bytes().to_vec();
    bytes.resize(nix::libc::IFNAMSIZ, 0);
    bytes
}

pub(super) fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

struct TypeName(&'static [DataType]);

impl fmt::Display for TypeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, kind) in self.0.iter().enumerate() {
            write!(f, "{}{}", if index == 0 { "" } else { " . " }, kind.nft_type().0)?;
        }
        Ok(())
    }
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, name, key) =
            (if self.data.is_empty() { "set" } else { "map" }, self.name, TypeName(self.key));
        write!(f, "{word} {name} {{ type {key}")?;
        if !self.data.is_empty() {
            write!(f, " : {}", TypeName(self.data))?;
        }
        match self.kind {
            SetKind::Exact => {}
            SetKind::Interval => f.write_str("; flags interval")?,
            SetKind::Dynamic { timeout_seconds, size } => {
                write!(f, "; size {size}; flags dynamic,timeout; timeout {timeout_seconds}s")?;
            }
        }
        f.write_str("; }")
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(name) => write!(f, "{name}"),
            Self::Mac(mac) => write!(f, "{mac}"),
            Self::Ip(ip) => write!(f, "{ip}"),
            Self::Subnet(subnet) => write!(f, "{subnet}"),
            Self::Protocols(first, last) if first == last => write!(f, "{first}"),
            Self::Protocols(first, last) => write!(f, "{first}-{last}"),
            Self::Ports(first, last) if first == last => write!(f, "{first}"),
            Self::Ports(first, last) => write!(f, "{first}-{last}"),
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let joined =
            |parts: &[Part]| parts.iter().map(ToString::to_string).collect::<Vec<_>>().join(" . ");
        f.write_str(&joined(&self.key))?;
        if self.data.is_empty() { Ok(()) } else { write!(f, " : {}", joined(&self.data)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_its_parts_padded_to_words() {
        let key = [
            Part::Link(LinkName::parse("bqtap").unwrap()),
            Part::Mac("02:00:00:00:00:01".parse().unwrap()),
            Part::Subnet("10.0.0.16/28".parse().unwrap()),
            Part::Ports(80, 90),
        ];
        let (first, last) = bytes(&key);
        assert_eq!(first.len(), 16 + 8 + 4 + 4);
        assert_eq!(&first[..6], b"bqtap\0");
        assert_eq!(first[16..], [2, 0, 0, 0, 0, 1, 0, 0, 10, 0, 0, 16, 0, 80, 0, 0]);
        assert_eq!(last[16..], [2, 0, 0, 0, 0, 1, 0, 0, 10, 0, 0, 31, 0, 90, 0, 0]);
        assert_eq!(length(&[DataType::Link, DataType::Mac, DataType::Ip4, DataType::Port]), 32);
    }
}
