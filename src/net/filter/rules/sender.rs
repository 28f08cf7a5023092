//! Chains for what a guest sends: only from its own addresses. They record its UDP packets, so that
//! replies reach it.

use super::*;

/// Returns the chains, for the `bridge` table.
pub(super) fn chains() -> Vec<Chain> {
    let chain = |name, rules| Chain { name, hook: None, rules };
    vec![
        Chain {
            name: "sender",
            hook: Some(Hook::filter(HookPoint::Prerouting, PRIORITY)),
            rules: sender(),
        },
        chain("itself", itself()),
        chain("itself_arp", itself_arp()),
        chain("itself_ip4", itself_ip4()),
        chain("itself_whole4", itself_whole4()),
        chain("itself_ip6", itself_ip6()),
        chain("itself_whole6", itself_whole6()),
        chain("itself_nd", itself_nd()),
        chain("itself_asks_router", itself_asks_router()),
        chain("itself_asks", itself_asks()),
        chain("itself_duplicate", itself_duplicate()),
        chain("itself_answers", itself_answers()),
        chain("itself_advertised", itself_advertised()),
        chain("itself_source6", itself_source6()),
        chain("asks", record_udp()),
    ]
}

fn sender() -> Vec<Rule> {
    vec![
        rule([in_set(&[IIFNAME], GUARDED)], Verdict::Jump("itself")),
        rule([in_set(&[IIFNAME], GROUPED), Match::Eq(PROTOCOL, UDP)], Verdict::Jump("asks")),
    ]
}

/// Drops every other type of frame, tagged ones among them: behind a tag, rules cannot see the
/// headers.
fn itself() -> Vec<Rule> {
    vec![
        drop_if([not_in_set(&[IIFNAME, ETHER_SADDR], MACS)]),
        // 01:80:c2:00:00:00 to 0f: for the bridge itself (IEEE 802.1Q, table 8-1).
        drop_if([Match::MaskedEq(
            ETHER_DADDR,
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xf0],
            &[0x01, 0x80, 0xc2, 0, 0, 0],
        )]),
        rule([Match::Eq(ETHER_TYPE, IP4)], Verdict::Goto("itself_ip4")),
        rule([Match::Eq(ETHER_TYPE, IP6)], Verdict::Goto("itself_ip6")),
        rule([Match::Eq(ETHER_TYPE, ARP)], Verdict::Goto("itself_arp")),
        drop_if([]),
    ]
}

/// Checks ARP's own sender fields: a receiver believes these, not the frame's source.
fn itself_arp() -> Vec<Rule> {
    let sender = [IIFNAME, ARP_SENDER_MAC, ARP_SENDER_IP];
    let target = [IIFNAME, ARP_SENDER_MAC, ARP_TARGET_IP];
    let probes = || Match::Eq(ARP_SENDER_IP, UNSPECIFIED4);
    vec![
        // Ethernet, IPv4, addresses of 6 and 4 bytes: with other lengths, the fields would be
        // elsewhere.
        drop_if([Match::Ne(ARP_KIND, &[0, 1, 8, 0, 6, 4])]),
        drop_if([not_in_set(&[IIFNAME, ARP_SENDER_MAC], MACS)]),
        return_if([in_set(&[IIFNAME], ROAMING)]),
        // A guest that probes its own address has none yet (RFC 5227 §2.1.1). A probe for another
        // machine's address would be a claim, on which that machine may give it up (§2.4).
        return_if([probes(), in_set(&target, ADDRESSES4)]),
        return_if([probes(), in_set(&target, BLOCKS4)]),
        return_if([in_set(&sender, ADDRESSES4)]),
        return_if([in_set(&sender, BLOCKS4)]),
        drop_if([]),
    ]
}

/// Drops malformed packets: a wrong version, or lengths that do not fit the frame. The kernel finds
/// no protocol in them, and no rule that names one matches (`nf_tables_ipv4.h`). A DHCP client that
/// reads raw frames may read them all the same.
fn itself_ip4() -> Vec<Rule> {
    vec![rule([Match::Present(PROTOCOL)], Verdict::Goto("itself_whole4")), drop_if([])]
}

fn itself_whole4() -> Vec<Rule> {
    let source = [IIFNAME, ETHER_SADDR, IP_SADDR];
    vec![
        // A DHCP server's reply to a client (RFC 2131 §4.1).
        drop_if([Match::Eq(PROTOCOL, UDP), Match::Eq(DESTINATION_PORT, &[0, 68])]),
        // A machine that queries listeners or speaks PIM is a multicast router: a bridge sends it
        // all groups, and forgets those that no listener reports again. Queries (RFC 9776 §4.1);
        // multicast router discovery (RFC 4286).
        drop_if([Match::Eq(PROTOCOL, IGMP), Match::InRange(IGMP_TYPE, &[0x11], &[0x11])]),
        drop_if([Match::Eq(PROTOCOL, IGMP), Match::InRange(IGMP_TYPE, &[0x30], &[0x32])]),
        drop_if([Match::Eq(PROTOCOL, PIM)]),
        return_if([in_set(&source, ADDRESSES4)]),
        return_if([in_set(&source, BLOCKS4)]),
        return_if([in_set(&[IIFNAME], ROAMING)]),
        drop_if([]),
    ]
}

/// Drops what the rules cannot parse: a first fragment may end before the header that identifies
/// it.
fn itself_ip6() -> Vec<Rule> {
    vec![
        // Later fragments are useless without the first.
        rule(
            [Match::Eq(IP6_NEXT, FRAGMENT), Match::MaskedNe(IP6_FRAGMENT, &[0xff, 0xf8], &[0, 0])],
            SOURCE6,
        ),
        rule(
            [Match::Present(PROTOCOL), Match::Present(DESTINATION_PORT)],
            Verdict::Goto("itself_whole6"),
        ),
        drop_if([]),
    ]
}

const SOURCE6: Verdict = Verdict::Goto("itself_source6");

fn itself_whole6() -> Vec<Rule> {
    let icmp = |first, last| [Match::Eq(PROTOCOL, ICMP6), Match::InRange(ICMP6_TYPE, first, last)];
    vec![
        // A DHCPv6 server's reply to a client (RFC 8415 §7.2).
        drop_if([Match::Eq(PROTOCOL, UDP), Match::Eq(DESTINATION_PORT, &[0x02, 0x22])]),
        // Router advertisements and redirects (RFC 4861).
        drop_if(icmp(&[134], &[134])),
        drop_if(icmp(&[137], &[137])),
        // Listener queries (RFC 9777 §5.1), inverse discovery (RFC 3122), routers' certificates
        // (RFC 3971), multicast router discovery (RFC 4286).
        drop_if(icmp(&[130], &[130])),
        drop_if(icmp(&[141], &[142])),
        drop_if(icmp(&[148], &[149])),
        drop_if(icmp(&[151], &[153])),
        drop_if([Match::Eq(PROTOCOL, PIM)]),
        rule(icmp(&[133], &[133]), Verdict::Goto("itself_nd")),
        rule(icmp(&[135], &[136]), Verdict::Goto("itself_nd")),
        rule([], SOURCE6),
    ]
}

fn itself_source6() -> Vec<Rule> {
    let source = [IIFNAME, ETHER_SADDR, IP6_SADDR];
    vec![
        return_if([in_set(&source, ADDRESSES6)]),
        return_if([in_set(&source, BLOCKS6)]),
        return_if([in_set(&[IIFNAME], ROAMING)]),
        // A listener report of a guest without an address (RFC 3810 §5.2.13).
        return_if([
            Match::Eq(IP6_SADDR, UNSPECIFIED6),
            Match::Eq(PROTOCOL, ICMP6),
            Match::Eq(ICMP6_TYPE, &[143]),
        ]),
        drop_if([]),
    ]
}

/// Checks neighbour discovery: a receiver believes the address in its option, and an
/// advertisement's target. The rules read one option, so there may be no other. There may be no
/// extension header either: a fragment could hide behind it (RFC 6980).
fn itself_nd() -> Vec<Rule> {
    let to = |kind, chain| rule([Match::Eq(ICMP6_TYPE, kind)], Verdict::Goto(chain));
    vec![
        drop_if([Match::Ne(IP6_NEXT, ICMP6)]),
        to(&[133], "itself_asks_router"),
        to(&[135], "itself_asks"),
        to(&[136], "itself_answers"),
        drop_if([]),
    ]
}

fn itself_asks_router() -> Vec<Rule> {
    solicitation(RS_OPTION, RS_OPTION_MAC, RS_SECOND_OPTION)
}

fn itself_asks() -> Vec<Rule> {
    let duplicate = rule([Match::Eq(IP6_SADDR, UNSPECIFIED6)], Verdict::Goto("itself_duplicate"));
    [duplicate]
        .into_iter()
        .chain(solicitation(ND_OPTION, ND_OPTION_MAC, ND_SECOND_OPTION))
        .collect()
}

/// Returns the rules for a solicitation: it has no option, or the guest's own address as the
/// sender's (type 1, 8 bytes).
fn solicitation(option: Field, mac: Field, second: Field) -> Vec<Rule> {
    vec![
        drop_if([Match::Present(second)]),
        rule([Match::Eq(option, &[1, 1]), in_set(&[IIFNAME, mac], MACS)], SOURCE6),
        drop_if([Match::Present(option)]),
        rule([], SOURCE6),
    ]
}

/// Checks duplicate address detection. The guest has no address yet (RFC 4862 §5.4.2), and a
/// receiver ignores a solicitation from the unspecified address if it has an option (RFC 4861
/// §7.1.1).
fn itself_duplicate() -> Vec<Rule> {
    let target = [IIFNAME, ETHER_SADDR, ND_TARGET];
    vec![
        return_if([in_set(&[IIFNAME], ROAMING)]),
        return_if([in_set(&target, ADDRESSES6)]),
        return_if([in_set(&target, BLOCKS6)]),
        drop_if([]),
    ]
}

fn itself_answers() -> Vec<Rule> {
    vec![
        drop_if([Match::Present(ND_SECOND_OPTION)]),
        rule(
            [Match::Eq(ND_OPTION, &[2, 1]), in_set(&[IIFNAME, ND_OPTION_MAC], MACS)],
            Verdict::Goto("itself_advertised"),
        ),
        drop_if([]),
    ]
}

fn itself_advertised() -> Vec<Rule> {
    let target = [IIFNAME, ETHER_SADDR, ND_TARGET];
    vec![
        return_if([in_set(&[IIFNAME], ROAMING)]),
        rule([in_set(&target, ADDRESSES6)], SOURCE6),
        rule([in_set(&target, BLOCKS6)], SOURCE6),
        drop_if([]),
    ]
}

fn record_udp() -> Vec<Rule> {
    let trace = |ethernet, source, destination, set: Set| {
        let key = vec![IIFNAME, source, destination, SOURCE_PORT, DESTINATION_PORT];
        rule([Match::Eq(ETHER_TYPE, ethernet)], Verdict::UpdateSet { key, set: set.name })
    };
    vec![trace(IP4, IP_SADDR, IP_DADDR, ASKED4), trace(IP6, IP6_SADDR, IP6_DADDR, ASKED6)]
}
