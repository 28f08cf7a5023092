//! The text of rules, in the syntax of the `nft` program (checked with nft 1.0.6).
//!
//! That version cannot parse one thing shown here: a raw payload (`@th,…`) in a set's key, which
//! has no type. The kernel compares its bytes.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;

use super::field::*;
use super::rule::{Match, Rule, Verdict};

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for each in &self.matches {
            write!(f, "{each} ")?;
        }
        write!(f, "{}", self.verdict)
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SourceIn(subnet @ IpNetwork::V4(_)) => write!(f, "ip saddr {subnet}"),
            Self::SourceIn(subnet @ IpNetwork::V6(_)) => write!(f, "ip6 saddr {subnet}"),
            Self::NotOutput(link) => write!(f, "oifname != \"{link}\""),
            Self::Link(field, link) => write!(f, "{field} \"{link}\""),
            Self::Eq(field, value) => write!(f, "{field} {}", Value(*field, value)),
            Self::DestinationPort(6, port) => write!(f, "tcp dport {port}"),
            Self::DestinationPort(17, port) => write!(f, "udp dport {port}"),
            Self::DestinationPort(protocol, port) => {
                write!(f, "{PROTOCOL} {protocol} {DESTINATION_PORT} {port}")
            }
            Self::Ne(field, value) => write!(f, "{field} != {}", Value(*field, value)),
            Self::Present(field) => write!(f, "{field} >= 0"),
            Self::InRange(field, first, last) if first == last => {
                write!(f, "{field} {}", Value(*field, first))
            }
            Self::InRange(field, first, last) => {
                write!(f, "{field} {}-{}", Value(*field, first), Value(*field, last))
            }
            Self::MaskedEq(field, mask, bits) => {
                write!(f, "{field} & {} == {}", Value(*field, mask), Value(*field, bits))
            }
            Self::MaskedNe(field, mask, bits) => {
                write!(f, "{field} & {} != {}", Value(*field, mask), Value(*field, bits))
            }
            Self::InSet(key, set) => write!(f, "{} @{set}", Key(key)),
            Self::NotInSet(key, set) => write!(f, "{} != @{set}", Key(key)),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Masquerade => f.write_str("masquerade"),
            Self::Drop => f.write_str("counter drop"),
            Self::Return => f.write_str("return"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
            Self::Dnat { v6, key, map } => {
                write!(f, "dnat {} to {} map @{map}", if *v6 { "ip6" } else { "ip" }, Key(key))
            }
            Self::SetMark(bits) => {
                write!(f, "meta mark set meta mark | {:#x}", u32::from_ne_bytes(*bits))
            }
            Self::UpdateSet { key, set } => write!(f, "update @{set} {{ {} }}", Key(key)),
        }
    }
}

/// Values of a field for which nft has a word (`nft describe`).
const WORDS: [(Field, &[u8], &str); 22] = [
    (FAMILY, &[2], "ipv4"),
    (FAMILY, &[10], "ipv6"),
    (PROTOCOL, &[1], "icmp"),
    (PROTOCOL, &[2], "igmp"),
    (PROTOCOL, &[6], "tcp"),
    (PROTOCOL, &[17], "udp"),
    (PROTOCOL, &[58], "ipv6-icmp"),
    (PROTOCOL, &[103], "pim"),
    (IP6_NEXT, &[44], "ipv6-frag"),
    (IP6_NEXT, &[58], "ipv6-icmp"),
    (ETHER_TYPE, &[0x08, 0x00], "ip"),
    (ETHER_TYPE, &[0x08, 0x06], "arp"),
    (ETHER_TYPE, &[0x86, 0xdd], "ip6"),
    (TCP_FLAGS, &[0x02], "syn"),
    (TCP_FLAGS, &[0x12], "(syn | ack)"),
    (CT_DIRECTION, &[0], "original"),
    (CT_STATE, &4u32.to_ne_bytes(), "related"),
    (CT_STATE, &6u32.to_ne_bytes(), "(established | related)"),
    (CT_STATE, &[0; 4], "0"),
    (CT_STATUS, &16u32.to_ne_bytes(), "snat"),
    (CT_STATUS, &32u32.to_ne_bytes(), "dnat"),
    (DESTINATION_TYPE, &2u32.to_ne_bytes(), "local"),
];

/// Fields whose values nft shows as decimal numbers.
const DECIMAL: [Field; 5] = [SOURCE_PORT, DESTINATION_PORT, IGMP_TYPE, ICMP_TYPE, ICMP6_TYPE];

/// Fields that hold an IP address.
const ADDRESSES: [Field; 6] =
    [ARP_SENDER_IP, ARP_TARGET_IP, IP_SADDR, IP_DADDR, IP6_SADDR, IP6_DADDR];

/// A value of a field: a word, an address, or a number.
struct Value(Field, &'static [u8]);

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(field, bytes) = *self;
        let is_word = |word: &&(Field, &[u8], &str)| word.0.text == field.text && word.1 == bytes;
        let is_one_of = |fields: &[Field]| fields.iter().any(|known| known.text == field.text);
        if let Some((_, _, word)) = WORDS.iter().find(is_word) {
            return f.write_str(word);
        }
        if is_one_of(&ADDRESSES) {
            if let Ok(octets) = <[u8; 4]>::try_from(bytes) {
                return write!(f, "{}", Ipv4Addr::from(octets));
            }
            if let Ok(octets) = <[u8; 16]>::try_from(bytes) {
                return write!(f, "{}", Ipv6Addr::from(octets));
            }
        }
        if is_one_of(&DECIMAL) {
            let number = bytes.iter().fold(0, |number, byte| number << 8 | u32::from(*byte));
            return write!(f, "{number}");
        }
        let mut bytes = bytes.to_vec();
        if field.is_host_order() && cfg!(target_endian = "little") {
            bytes.reverse();
        }
        f.write_str("0x")?;
        bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
