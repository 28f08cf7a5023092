//! Rules of the two tables `bosh-qemu-guard`, the same for all VMs. A VM is elements of their sets.
//!
//! ```text
//!   tap ──▶ bridge: sender ──┬─▶ another port ────────────────────────────▶ receiver ──▶ tap
//!                            └─▶ the host:  inet … routed, forwarded … ───▶ receiver ──▶ tap
//! ```
//! Frames between two guests never reach the host's IP rules, unless br_netfilter takes them there.
//! All rules but forwards are therefore in the `bridge` table, and hold with and without
//! br_netfilter. Bridges track no connections (`nf_conntrack_bridge` is not in every kernel). The
//! rules recognise a reply by TCP's flags, by ICMP's types, and for UDP by what the guest itself
//! sent before. Bridges cannot see the sender behind a masqueraded address; the `inet` table can.

mod host;
mod receiver;
mod sender;

use super::super::firewall::HOST_MARK;
use super::super::nft::*;

const TABLE_NAME: &str = "bosh-qemu-guard";
/// Before other tables' filters, and before br_netfilter (`NF_BR_PRI_FILTER_BRIDGED`).
const PRIORITY: i32 = -200;
/// Before connection tracking (`NF_IP_PRI_RAW`).
const BEFORE_CONNTRACK: i32 = -300;

const ARP: &[u8] = &[0x08, 0x06];
const IP4: &[u8] = &[0x08, 0x00];
const IP6: &[u8] = &[0x86, 0xdd];
const ICMP: &[u8] = &[1];
const IGMP: &[u8] = &[2];
const TCP: &[u8] = &[6];
const UDP: &[u8] = &[17];
const FRAGMENT: &[u8] = &[44];
const ICMP6: &[u8] = &[58];
const PIM: &[u8] = &[103];
/// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
const FAMILY4: &[u8] = &[2];
const FAMILY6: &[u8] = &[10];
const UNSPECIFIED4: &[u8] = &[0; 4];
const UNSPECIFIED6: &[u8] = &[0; 16];
const LOOPBACK6: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

macro_rules! sets {
    ($($(#[$doc:meta])* $name:ident = $set:expr;)*) => {
        $($(#[$doc])* pub(super) const $name: Set = $set;)*
    };
}

use DataType::{Ip4, Ip6, Link, Mac, Port, Protocol};

sets! {
    /// Taps that have rules; in both tables.
    TAPS = Set::exact("taps", &[Link]);
    /// Taps with `anti_spoof`: they may send only from their own addresses.
    GUARDED = Set::exact("guarded", &[Link]);
    MACS = Set::exact("macs", &[Link, Mac]);
    ADDRESSES4 = Set::exact("addresses4", &[Link, Mac, Ip4]);
    ADDRESSES6 = Set::exact("addresses6", &[Link, Mac, Ip6]);
    /// Subnets are apart from single addresses: a hash table finds these faster and adds one at the
    /// same cost however many there are.
    BLOCKS4 = Set::interval("blocks4", &[Link, Mac, Ip4]);
    BLOCKS6 = Set::interval("blocks6", &[Link, Mac, Ip6]);
    /// Taps whose addresses another machine's DHCP server gives.
    ROAMING = Set::exact("roaming", &[Link]);
    /// Taps with security groups: only admitted sources may open connections to them.
    GROUPED = Set::exact("grouped", &[Link]);
    /// Admitted sources of a tap, by ports …
    PORTS4 = Set::interval("ports4", &[Link, Ip4, Protocol, Port]);
    PORTS6 = Set::interval("ports6", &[Link, Ip6, Protocol, Port]);
    /// … and by whole protocols.
    PROTOCOLS4 = Set::interval("protocols4", &[Link, Ip4, Protocol]);
    PROTOCOLS6 = Set::interval("protocols6", &[Link, Ip6, Protocol]);
    /// UDP packets that grouped taps sent, so that replies reach them.
    ASKED4 = Set { kind: UDP_REPLIES, ..Set::exact("asked4", &[Link, Ip4, Ip4, Port, Port]) };
    ASKED6 = Set { kind: UDP_REPLIES, ..Set::exact("asked6", &[Link, Ip6, Ip6, Port, Port]) };
    /// Forwarded ports of all the host's addresses …
    FORWARDS4 = Set { data: &[Ip4, Port], ..Set::exact("forwards4", &[Protocol, Port]) };
    FORWARDS6 = Set { data: &[Ip6, Port], ..Set::exact("forwards6", &[Protocol, Port]) };
    /// … and of one of its addresses.
    FORWARDS_AT4 = Set { data: &[Ip4, Port], ..Set::exact("forwards_at4", &[Ip4, Protocol, Port]) };
    FORWARDS_AT6 = Set { data: &[Ip6, Port], ..Set::exact("forwards_at6", &[Ip6, Protocol, Port]) };
    /// Addresses of VMs with security groups, each on its bridge: as `GROUPED`, for masqueraded
    /// senders …
    MASKED4 = Set::interval("masked4", &[Link, Ip4]);
    MASKED6 = Set::interval("masked6", &[Link, Ip6]);
    /// … and their admitted sources, by ports and by whole protocols.
    MASKED_PORTS4 = Set::interval("masked_ports4", &[Link, Ip4, Ip4, Protocol, Port]);
    MASKED_PORTS6 = Set::interval("masked_ports6", &[Link, Ip6, Ip6, Protocol, Port]);
    MASKED_PROTOCOLS4 = Set::interval("masked_protocols4", &[Link, Ip4, Ip4, Protocol]);
    MASKED_PROTOCOLS6 = Set::interval("masked_protocols6", &[Link, Ip6, Ip6, Protocol]);
}

/// Lifetime of a recorded UDP packet: that of a UDP stream in the kernel
/// (`nf_conntrack_udp_timeout_stream`, 120 s), plus a margin.
const UDP_REPLIES: SetKind = SetKind::Dynamic { timeout_seconds: 180, size: 65_536 };

fn rule<const N: usize>(matches: [Match; N], verdict: Verdict) -> Rule {
    Rule { matches: matches.into(), verdict }
}

fn drop_if<const N: usize>(matches: [Match; N]) -> Rule {
    rule(matches, Verdict::Drop)
}

fn return_if<const N: usize>(matches: [Match; N]) -> Rule {
    rule(matches, Verdict::Return)
}

fn in_set(fields: &[Field], set: Set) -> Match {
    Match::InSet(fields.to_vec(), set.name)
}

fn not_in_set(fields: &[Field], set: Set) -> Match {
    Match::NotInSet(fields.to_vec(), set.name)
}

/// Returns the table for frames on bridges.
pub(super) fn bridge_table() -> Table {
    Table {
        family: Family::Bridge,
        name: TABLE_NAME.to_owned(),
        sets: vec![
            TAPS, GUARDED, MACS, ADDRESSES4, ADDRESSES6, BLOCKS4, BLOCKS6, ROAMING, GROUPED,
            PORTS4, PORTS6, PROTOCOLS4, PROTOCOLS6, ASKED4, ASKED6,
        ],
        chains: sender::chains().into_iter().chain(receiver::chains()).collect(),
    }
}

/// Returns the table for the host's own IP packets.
pub(super) fn inet_table() -> Table {
    Table {
        family: Family::Inet,
        name: TABLE_NAME.to_owned(),
        sets: vec![
            TAPS,
            FORWARDS4,
            FORWARDS6,
            FORWARDS_AT4,
            FORWARDS_AT6,
            MASKED4,
            MASKED6,
            MASKED_PORTS4,
            MASKED_PORTS6,
            MASKED_PROTOCOLS4,
            MASKED_PROTOCOLS6,
        ],
        chains: host::chains(),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_two_tables() {
        insta::assert_snapshot!(format!("{}\n{}", super::bridge_table(), super::inet_table()));
    }
}
