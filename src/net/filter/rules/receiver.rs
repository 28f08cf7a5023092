//! Chains for what reaches a guest with security groups: what the groups admit, and replies.

use super::*;

/// Returns the chains, for the `bridge` table.
pub(super) fn chains() -> Vec<Chain> {
    let chain = |name, rules| Chain { name, hook: None, rules };
    vec![
        Chain {
            name: "receiver",
            hook: Some(Hook::filter(HookPoint::Postrouting, PRIORITY)),
            rules: receiver(),
        },
        chain("admitted", admitted()),
        chain("admitted_ip4", admitted_ip4()),
        chain("admitted_ip6", admitted_ip6()),
    ]
}

fn receiver() -> Vec<Rule> {
    vec![
        return_if([Match::MaskedEq(MARK, &HOST_MARK, &HOST_MARK)]),
        rule([in_set(&[OIFNAME], GROUPED)], Verdict::Jump("admitted")),
    ]
}

fn admitted() -> Vec<Rule> {
    vec![
        return_if([Match::Eq(ETHER_TYPE, ARP)]),
        rule([Match::Eq(ETHER_TYPE, IP4)], Verdict::Goto("admitted_ip4")),
        rule([Match::Eq(ETHER_TYPE, IP6)], Verdict::Goto("admitted_ip6")),
        drop_if([]),
    ]
}

/// Returns the rule that admits every TCP packet but the first of a connection: SYN without ACK.
fn established_tcp() -> Rule {
    return_if([Match::Eq(PROTOCOL, TCP), Match::MaskedNe(TCP_FLAGS, &[0x12], &[0x02])])
}

/// Returns the rule that admits a DHCP server's reply, whose source is not the address the guest
/// asked (RFC 2131 §4.1, RFC 8415 §7.2).
fn dhcp_reply(server: &'static [u8], client: &'static [u8]) -> Rule {
    let (from, to) = (Match::Eq(SOURCE_PORT, server), Match::Eq(DESTINATION_PORT, client));
    return_if([in_set(&[OIFNAME], ROAMING), Match::Eq(PROTOCOL, UDP), from, to])
}

fn admitted_ip4() -> Vec<Rule> {
    let answer = |first, last| {
        return_if([Match::Eq(PROTOCOL, ICMP), Match::InRange(ICMP_TYPE, first, last)])
    };
    vec![
        established_tcp(),
        return_if([
            Match::Eq(PROTOCOL, UDP),
            in_set(&[OIFNAME, IP_DADDR, IP_SADDR, DESTINATION_PORT, SOURCE_PORT], ASKED4),
        ]),
        dhcp_reply(&[0, 67], &[0, 68]),
        return_if([in_set(&[OIFNAME, IP_SADDR, PROTOCOL, DESTINATION_PORT], PORTS4)]),
        return_if([in_set(&[OIFNAME, IP_SADDR, PROTOCOL], PROTOCOLS4)]),
        // Later fragments are useless without the first. Malformed packets have no protocol.
        return_if([Match::Present(PROTOCOL), Match::MaskedNe(IP_FRAGMENT, &[0x1f, 0xff], &[0, 0])]),
        // Echo reply, destination unreachable, time exceeded, parameter problem.
        answer(&[0], &[0]),
        answer(&[3], &[3]),
        answer(&[11], &[12]),
        drop_if([]),
    ]
}

fn admitted_ip6() -> Vec<Rule> {
    let answer = |first, last| {
        return_if([Match::Eq(PROTOCOL, ICMP6), Match::InRange(ICMP6_TYPE, first, last)])
    };
    vec![
        established_tcp(),
        return_if([
            Match::Eq(PROTOCOL, UDP),
            in_set(&[OIFNAME, IP6_DADDR, IP6_SADDR, DESTINATION_PORT, SOURCE_PORT], ASKED6),
        ]),
        dhcp_reply(&[0x02, 0x23], &[0x02, 0x22]),
        return_if([in_set(&[OIFNAME, IP6_SADDR, PROTOCOL, DESTINATION_PORT], PORTS6)]),
        return_if([in_set(&[OIFNAME, IP6_SADDR, PROTOCOL], PROTOCOLS6)]),
        return_if([
            Match::Eq(IP6_NEXT, FRAGMENT),
            Match::MaskedNe(IP6_FRAGMENT, &[0xff, 0xf8], &[0, 0]),
        ]),
        // Errors; echo reply; multicast listeners, routers and neighbours.
        answer(&[1], &[4]),
        answer(&[129], &[136]),
        drop_if([]),
    ]
}
