//! The guard's two tables: every rule there is for any VM. VMs are elements of their sets.
//!
//! ```text
//!   tap ──▶ bridge: sender ──┬─▶ another port ────────────────────────────▶ receiver ──▶ tap
//!                            └─▶ the host:  inet … routed, forwarded … ───▶ receiver ──▶ tap
//! ```
//! Frames that one guest sends to another never come to the host's IP rules, unless br_netfilter takes them there.
//! So everything but forwards is said to the bridges, and holds with and without br_netfilter. Bridges follow no
//! connections (`nf_conntrack_bridge` is not in every kernel): that a packet answers another is told by TCP's flags,
//! ICMP's types, and for UDP by what the guest sent itself before.

use super::super::firewall::OF_THE_HOST;
use super::super::nft::*;

const BRIDGE: &str = "bosh-qemu-guard";
/// Before other tables' filters, and before br_netfilter (`NF_BR_PRI_FILTER_BRIDGED`).
const PRIORITY: i32 = -200;
/// Before connections are followed (`NF_IP_PRI_RAW`).
const RAW: i32 = -300;

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

use Kind::{Ip4, Ip6, Link, Mac, Port, Protocol};

sets! {
    /// Every tap that has rules at all. In both tables.
    TAPS = Set::of("taps", &[Link]);
    /// Taps that may send only as themselves.
    GUARDED = Set::of("guarded", &[Link]);
    MACS = Set::of("macs", &[Link, Mac]);
    ADDRESSES4 = Set::of("addresses4", &[Link, Mac, Ip4]);
    ADDRESSES6 = Set::of("addresses6", &[Link, Mac, Ip6]);
    /// Apart from single addresses, which a hash table finds faster and takes in at one cost however many there are.
    BLOCKS4 = Set::ranges("blocks4", &[Link, Mac, Ip4]);
    BLOCKS6 = Set::ranges("blocks6", &[Link, Mac, Ip6]);
    /// Taps whose addresses somebody else's DHCP server gives.
    ROAMING = Set::of("roaming", &[Link]);
    /// Taps that only some may begin to speak to.
    GROUPED = Set::of("grouped", &[Link]);
    /// By whom, to which ports, …
    PORTS4 = Set::ranges("ports4", &[Link, Ip4, Protocol, Port]);
    PORTS6 = Set::ranges("ports6", &[Link, Ip6, Protocol, Port]);
    /// … or by whole protocols.
    PROTOCOLS4 = Set::ranges("protocols4", &[Link, Ip4, Protocol]);
    PROTOCOLS6 = Set::ranges("protocols6", &[Link, Ip6, Protocol]);
    /// What grouped taps sent by UDP, so that answers come in.
    ASKED4 = Set { holds: ASKED, ..Set::of("asked4", &[Link, Ip4, Ip4, Port, Port]) };
    ASKED6 = Set { holds: ASKED, ..Set::of("asked6", &[Link, Ip6, Ip6, Port, Port]) };
    /// Ports of the host …
    FORWARDS4 = Set { data: &[Ip4, Port], ..Set::of("forwards4", &[Protocol, Port]) };
    FORWARDS6 = Set { data: &[Ip6, Port], ..Set::of("forwards6", &[Protocol, Port]) };
    /// … and of one of its addresses.
    FORWARDS_AT4 = Set { data: &[Ip4, Port], ..Set::of("forwards_at4", &[Ip4, Protocol, Port]) };
    FORWARDS_AT6 = Set { data: &[Ip6, Port], ..Set::of("forwards_at6", &[Ip6, Protocol, Port]) };
}

/// As long as the kernel follows a UDP stream (`nf_conntrack_udp_timeout_stream`, 120 s), and a little more.
const ASKED: Holds = Holds::Traces { seconds: 180, most: 65_536 };

fn rule<const N: usize>(matches: [Match; N], verdict: Verdict) -> Rule {
    Rule { matches: matches.into(), verdict }
}

fn drop_if<const N: usize>(matches: [Match; N]) -> Rule {
    rule(matches, Verdict::Drop)
}

fn return_if<const N: usize>(matches: [Match; N]) -> Rule {
    rule(matches, Verdict::Return)
}

fn known(fields: &[Field], set: Set) -> Match {
    Match::In(fields.to_vec(), set.name)
}

fn unknown(fields: &[Field], set: Set) -> Match {
    Match::NotIn(fields.to_vec(), set.name)
}

/// What is said to the bridges.
pub(super) fn bridge_table() -> Table {
    let chain = |name, hook, rules| Chain { name, hook, rules };
    let hook = |place| Some(Hook::filter(place, PRIORITY));
    Table {
        family: Family::Bridge,
        name: BRIDGE.to_owned(),
        sets: vec![
            TAPS, GUARDED, MACS, ADDRESSES4, ADDRESSES6, BLOCKS4, BLOCKS6, ROAMING, GROUPED, PORTS4, PORTS6,
            PROTOCOLS4, PROTOCOLS6, ASKED4, ASKED6,
        ],
        chains: vec![
            chain("sender", hook(Place::Prerouting), sender()),
            chain("itself", None, itself()),
            chain("itself_arp", None, itself_arp()),
            chain("itself_ip4", None, itself_ip4()),
            chain("itself_ip6", None, itself_ip6()),
            chain("itself_whole6", None, itself_whole6()),
            chain("itself_nd", None, itself_nd()),
            chain("itself_asks_router", None, itself_asks_router()),
            chain("itself_asks", None, itself_asks()),
            chain("itself_duplicate", None, itself_duplicate()),
            chain("itself_answers", None, itself_answers()),
            chain("itself_advertised", None, itself_advertised()),
            chain("itself_source6", None, itself_source6()),
            chain("asks", None, asks()),
            chain("receiver", hook(Place::Postrouting), receiver()),
            chain("admitted", None, admitted()),
            chain("admitted_ip4", None, admitted_ip4()),
            chain("admitted_ip6", None, admitted_ip6()),
        ],
    }
}

fn sender() -> Vec<Rule> {
    vec![
        rule([known(&[IIFNAME], GUARDED)], Verdict::Jump("itself")),
        rule([known(&[IIFNAME], GROUPED), Match::Is(PROTOCOL, UDP)], Verdict::Jump("asks")),
    ]
}

/// Any other type of frame, tagged ones among them, is dropped: behind a tag, nothing could be looked at.
fn itself() -> Vec<Rule> {
    vec![
        drop_if([unknown(&[IIFNAME, ETHER_SADDR], MACS)]),
        rule([Match::Is(ETHER_TYPE, IP4)], Verdict::Goto("itself_ip4")),
        rule([Match::Is(ETHER_TYPE, IP6)], Verdict::Goto("itself_ip6")),
        rule([Match::Is(ETHER_TYPE, ARP)], Verdict::Goto("itself_arp")),
        drop_if([]),
    ]
}

/// Whoever hears ARP believes its sender fields, not the frame's.
fn itself_arp() -> Vec<Rule> {
    let sender = [IIFNAME, ARP_SENDER_MAC, ARP_SENDER_IP];
    let target = [IIFNAME, ARP_SENDER_MAC, ARP_TARGET_IP];
    let probes = || Match::Is(ARP_SENDER_IP, UNSPECIFIED4);
    vec![
        // Ethernet, IPv4, addresses of 6 and 4 bytes: or the fields would be elsewhere.
        drop_if([Match::IsNot(ARP_KIND, &[0, 1, 8, 0, 6, 4])]),
        drop_if([unknown(&[IIFNAME, ARP_SENDER_MAC], MACS)]),
        return_if([known(&[IIFNAME], ROAMING)]),
        // A guest that asks whether its address is free has none yet (RFC 5227 §2.1.1). Of another's address that
        // would be a claim, on which its holder may give it up (§2.4).
        return_if([probes(), known(&target, ADDRESSES4)]),
        return_if([probes(), known(&target, BLOCKS4)]),
        return_if([known(&sender, ADDRESSES4)]),
        return_if([known(&sender, BLOCKS4)]),
        drop_if([]),
    ]
}

fn itself_ip4() -> Vec<Rule> {
    let source = [IIFNAME, ETHER_SADDR, IP_SADDR];
    vec![
        // To a DHCP client (RFC 2131 §4.1).
        drop_if([Match::Is(PROTOCOL, UDP), Match::Is(DESTINATION_PORT, &[0, 68])]),
        // Who queries listeners and speaks PIM is a multicast router: a bridge sends it all groups and forgets those
        // that others do not report again. Queries (RFC 9776 §4.1); multicast router discovery (RFC 4286).
        drop_if([Match::Is(PROTOCOL, IGMP), Match::Within(IGMP_TYPE, &[0x11], &[0x11])]),
        drop_if([Match::Is(PROTOCOL, IGMP), Match::Within(IGMP_TYPE, &[0x30], &[0x32])]),
        drop_if([Match::Is(PROTOCOL, PIM)]),
        return_if([known(&source, ADDRESSES4)]),
        return_if([known(&source, BLOCKS4)]),
        return_if([known(&[IIFNAME], ROAMING)]),
        drop_if([]),
    ]
}

/// What can not be looked at is dropped: a first fragment may end before the header that says what it is.
fn itself_ip6() -> Vec<Rule> {
    vec![
        // What comes after the first fragment is worth nothing without it.
        rule([Match::Is(IP6_NEXT, FRAGMENT), Match::OtherBits(IP6_FRAGMENT, &[0xff, 0xf8], &[0, 0])], SOURCE6),
        rule([Match::Has(PROTOCOL), Match::Has(DESTINATION_PORT)], Verdict::Goto("itself_whole6")),
        drop_if([]),
    ]
}

const SOURCE6: Verdict = Verdict::Goto("itself_source6");

fn itself_whole6() -> Vec<Rule> {
    let icmp = |first, last| [Match::Is(PROTOCOL, ICMP6), Match::Within(ICMP6_TYPE, first, last)];
    vec![
        // To a DHCPv6 client (RFC 8415 §7.2).
        drop_if([Match::Is(PROTOCOL, UDP), Match::Is(DESTINATION_PORT, &[0x02, 0x22])]),
        // Router advertisements and redirects (RFC 4861).
        drop_if(icmp(&[134], &[134])),
        drop_if(icmp(&[137], &[137])),
        // Listener queries (RFC 9777 §5.1), inverse discovery (RFC 3122), routers' certificates (RFC 3971), multicast
        // router discovery (RFC 4286).
        drop_if(icmp(&[130], &[130])),
        drop_if(icmp(&[141], &[142])),
        drop_if(icmp(&[148], &[149])),
        drop_if(icmp(&[151], &[153])),
        drop_if([Match::Is(PROTOCOL, PIM)]),
        rule(icmp(&[133], &[133]), Verdict::Goto("itself_nd")),
        rule(icmp(&[135], &[136]), Verdict::Goto("itself_nd")),
        rule([], SOURCE6),
    ]
}

fn itself_source6() -> Vec<Rule> {
    let source = [IIFNAME, ETHER_SADDR, IP6_SADDR];
    vec![
        return_if([known(&source, ADDRESSES6)]),
        return_if([known(&source, BLOCKS6)]),
        return_if([known(&[IIFNAME], ROAMING)]),
        // A listener report of a guest that has no address yet (RFC 3810 §5.2.13).
        return_if([Match::Is(IP6_SADDR, UNSPECIFIED6), Match::Is(PROTOCOL, ICMP6), Match::Is(ICMP6_TYPE, &[143])]),
        drop_if([]),
    ]
}

/// Neighbour discovery. Whoever hears it believes the address in its option, and of an advertisement the target. One
/// option is looked at, so there may be no other; nor headers before, behind which a fragment could hide one (RFC 6980).
fn itself_nd() -> Vec<Rule> {
    let to = |kind, chain| rule([Match::Is(ICMP6_TYPE, kind)], Verdict::Goto(chain));
    vec![
        drop_if([Match::IsNot(IP6_NEXT, ICMP6)]),
        to(&[133], "itself_asks_router"),
        to(&[135], "itself_asks"),
        to(&[136], "itself_answers"),
        drop_if([]),
    ]
}

fn itself_asks_router() -> Vec<Rule> {
    asks_as_itself(RS_OPTION, RS_OPTION_MAC, RS_SECOND_OPTION)
}

fn itself_asks() -> Vec<Rule> {
    let duplicate = rule([Match::Is(IP6_SADDR, UNSPECIFIED6)], Verdict::Goto("itself_duplicate"));
    [duplicate].into_iter().chain(asks_as_itself(ND_OPTION, ND_OPTION_MAC, ND_SECOND_OPTION)).collect()
}

/// With no option, or with its own address as the asker's (type 1, of 8 bytes).
fn asks_as_itself(option: Field, mac: Field, second: Field) -> Vec<Rule> {
    vec![
        drop_if([Match::Has(second)]),
        rule([Match::Is(option, &[1, 1]), known(&[IIFNAME, mac], MACS)], SOURCE6),
        drop_if([Match::Has(option)]),
        rule([], SOURCE6),
    ]
}

/// A guest that asks whether its address is free has none yet (RFC 4862 §5.4.2), and nobody takes an option for its
/// address (RFC 4861 §7.1.1).
fn itself_duplicate() -> Vec<Rule> {
    let target = [IIFNAME, ETHER_SADDR, ND_TARGET];
    vec![
        return_if([known(&[IIFNAME], ROAMING)]),
        return_if([known(&target, ADDRESSES6)]),
        return_if([known(&target, BLOCKS6)]),
        drop_if([]),
    ]
}

fn itself_answers() -> Vec<Rule> {
    vec![
        drop_if([Match::Has(ND_SECOND_OPTION)]),
        rule(
            [Match::Is(ND_OPTION, &[2, 1]), known(&[IIFNAME, ND_OPTION_MAC], MACS)],
            Verdict::Goto("itself_advertised"),
        ),
        drop_if([]),
    ]
}

fn itself_advertised() -> Vec<Rule> {
    let target = [IIFNAME, ETHER_SADDR, ND_TARGET];
    vec![
        return_if([known(&[IIFNAME], ROAMING)]),
        rule([known(&target, ADDRESSES6)], SOURCE6),
        rule([known(&target, BLOCKS6)], SOURCE6),
        drop_if([]),
    ]
}

fn asks() -> Vec<Rule> {
    let trace = |ethernet, source, destination, set: Set| {
        let key = vec![IIFNAME, source, destination, SOURCE_PORT, DESTINATION_PORT];
        rule([Match::Is(ETHER_TYPE, ethernet)], Verdict::Trace { key, set: set.name })
    };
    vec![trace(IP4, IP_SADDR, IP_DADDR, ASKED4), trace(IP6, IP6_SADDR, IP6_DADDR, ASKED6)]
}

fn receiver() -> Vec<Rule> {
    vec![
        return_if([Match::Bits(MARK, &OF_THE_HOST, &OF_THE_HOST)]),
        rule([known(&[OIFNAME], GROUPED)], Verdict::Jump("admitted")),
    ]
}

fn admitted() -> Vec<Rule> {
    vec![
        return_if([Match::Is(ETHER_TYPE, ARP)]),
        rule([Match::Is(ETHER_TYPE, IP4)], Verdict::Goto("admitted_ip4")),
        rule([Match::Is(ETHER_TYPE, IP6)], Verdict::Goto("admitted_ip6")),
        drop_if([]),
    ]
}

/// Everything of TCP but the packet that opens a connection: SYN without ACK.
fn goes_on() -> Rule {
    return_if([Match::Is(PROTOCOL, TCP), Match::OtherBits(TCP_FLAGS, &[0x12], &[0x02])])
}

/// The answer of a DHCP server comes from an address that the guest did not ask (RFC 2131 §4.1, RFC 8415 §7.2).
fn dhcp(server: &'static [u8], client: &'static [u8]) -> Rule {
    let (from, to) = (Match::Is(SOURCE_PORT, server), Match::Is(DESTINATION_PORT, client));
    return_if([known(&[OIFNAME], ROAMING), Match::Is(PROTOCOL, UDP), from, to])
}

fn admitted_ip4() -> Vec<Rule> {
    let answer = |first, last| return_if([Match::Is(PROTOCOL, ICMP), Match::Within(ICMP_TYPE, first, last)]);
    vec![
        goes_on(),
        return_if([
            Match::Is(PROTOCOL, UDP),
            known(&[OIFNAME, IP_DADDR, IP_SADDR, DESTINATION_PORT, SOURCE_PORT], ASKED4),
        ]),
        dhcp(&[0, 67], &[0, 68]),
        return_if([known(&[OIFNAME, IP_SADDR, PROTOCOL, DESTINATION_PORT], PORTS4)]),
        return_if([known(&[OIFNAME, IP_SADDR, PROTOCOL], PROTOCOLS4)]),
        // What comes after the first fragment is worth nothing without it.
        return_if([Match::OtherBits(IP_FRAGMENT, &[0x1f, 0xff], &[0, 0])]),
        // Echo reply, destination unreachable, time exceeded, parameter problem.
        answer(&[0], &[0]),
        answer(&[3], &[3]),
        answer(&[11], &[12]),
        drop_if([]),
    ]
}

fn admitted_ip6() -> Vec<Rule> {
    let answer = |first, last| return_if([Match::Is(PROTOCOL, ICMP6), Match::Within(ICMP6_TYPE, first, last)]);
    vec![
        goes_on(),
        return_if([
            Match::Is(PROTOCOL, UDP),
            known(&[OIFNAME, IP6_DADDR, IP6_SADDR, DESTINATION_PORT, SOURCE_PORT], ASKED6),
        ]),
        dhcp(&[0x02, 0x23], &[0x02, 0x22]),
        return_if([known(&[OIFNAME, IP6_SADDR, PROTOCOL, DESTINATION_PORT], PORTS6)]),
        return_if([known(&[OIFNAME, IP6_SADDR, PROTOCOL], PROTOCOLS6)]),
        return_if([Match::Is(IP6_NEXT, FRAGMENT), Match::OtherBits(IP6_FRAGMENT, &[0xff, 0xf8], &[0, 0])]),
        // Errors; echo reply; multicast listeners, routers and neighbours.
        answer(&[1], &[4]),
        answer(&[129], &[136]),
        drop_if([]),
    ]
}

/// What is said to the host's own IP.
pub(super) fn inet_table() -> Table {
    let chain = |name, hook, rules| Chain { name, hook: Some(hook), rules };
    Table {
        family: Family::Inet,
        name: BRIDGE.to_owned(),
        sets: vec![TAPS, FORWARDS4, FORWARDS6, FORWARDS_AT4, FORWARDS_AT6],
        chains: vec![
            chain("strays", Hook::filter(Place::Prerouting, RAW), strays()),
            chain("forwards", Hook::DESTINATION_NAT, forwards()),
            chain("own_forwards", Hook::OWN_DESTINATION_NAT, own_forwards()),
        ],
    }
}

/// A bridge hands frames to 01:80:c2:00:00:0e up past its own rules, as if the tap were no port
/// (`net/bridge/br_input.c`).
fn strays() -> Vec<Rule> {
    vec![drop_if([known(&[IIFNAME], TAPS)])]
}

fn forwards() -> Vec<Rule> {
    let to = |v6, key: &[Field], map: Set| Verdict::Forward { v6, key: key.to_vec(), map: map.name };
    let local = || Match::Is(DESTINATION_TYPE, &LOCAL);
    vec![
        // Only addresses of the host: another's packets are not ours to take.
        rule([Match::Is(FAMILY, FAMILY4), local()], to(false, &[IP_DADDR, PROTOCOL, DESTINATION_PORT], FORWARDS_AT4)),
        rule([Match::Is(FAMILY, FAMILY4), local()], to(false, &[PROTOCOL, DESTINATION_PORT], FORWARDS4)),
        rule([Match::Is(FAMILY, FAMILY6), local()], to(true, &[IP6_DADDR, PROTOCOL, DESTINATION_PORT], FORWARDS_AT6)),
        rule([Match::Is(FAMILY, FAMILY6), local()], to(true, &[PROTOCOL, DESTINATION_PORT], FORWARDS6)),
    ]
}

/// `RTN_LOCAL`, in the machine's byte order.
const LOCAL: [u8; 4] = 2u32.to_ne_bytes();

/// Programs of the host use forwards like anybody, but for its loopback addresses, which lead nowhere else.
fn own_forwards() -> Vec<Rule> {
    let loopback4 = return_if([Match::Is(FAMILY, FAMILY4), Match::Bits(IP_DADDR, &[255, 0, 0, 0], &[127, 0, 0, 0])]);

    let loopback6 = return_if([Match::Is(FAMILY, FAMILY6), Match::Is(IP6_DADDR, LOOPBACK6)]);
    [loopback4, loopback6].into_iter().chain(forwards()).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_two_tables() {
        insta::assert_snapshot!(format!("{}\n{}", super::bridge_table(), super::inet_table()));
    }
}
