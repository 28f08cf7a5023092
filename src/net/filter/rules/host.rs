//! Chains of the `inet` table: where the host's ports lead, and which sender is behind a
//! masqueraded address.

use super::*;

/// Returns the chains of the `inet` table.
pub(super) fn chains() -> Vec<Chain> {
    let hooked = |name, hook, rules| Chain { name, hook: Some(hook), rules };
    let chain = |name, rules| Chain { name, hook: None, rules };
    vec![
        hooked("strays", Hook::filter(HookPoint::Prerouting, BEFORE_CONNTRACK), strays()),
        hooked("forwards", Hook::DESTINATION_NAT, forwards()),
        hooked("own_forwards", Hook::OUTPUT_DESTINATION_NAT, own_forwards()),
        hooked("masked", Hook::filter(HookPoint::Postrouting, BEHIND_SOURCE_NAT), masked()),
        chain("masked_ip", masked_ip()),
        chain(
            "masked_ip4",
            masked_by(IP_DADDR, CT_SADDR4, [MASKED_PORTS4, MASKED_PROTOCOLS4, MASKED4]),
        ),
        chain(
            "masked_ip6",
            masked_by(IP6_DADDR, CT_SADDR6, [MASKED_PORTS6, MASKED_PROTOCOLS6, MASKED6]),
        ),
        chain("vouched", vec![rule([], Verdict::SetMark(HOST_MARK))]),
    ]
}

/// Drops packets whose input link is a tap: a bridge passes frames to 01:80:c2:00:00:0e up to the
/// host past its own rules, as if the tap were no port (`net/bridge/br_input.c`).
fn strays() -> Vec<Rule> {
    vec![drop_if([in_set(&[IIFNAME], TAPS)])]
}

fn forwards() -> Vec<Rule> {
    let to = |v6, key: &[Field], map: Set| Verdict::Dnat { v6, key: key.to_vec(), map: map.name };
    let local = || Match::Eq(DESTINATION_TYPE, &LOCAL);
    vec![
        // Only for the host's own addresses: packets to other machines pass unchanged.
        rule(
            [Match::Eq(FAMILY, FAMILY4), local()],
            to(false, &[IP_DADDR, PROTOCOL, DESTINATION_PORT], FORWARDS_AT4),
        ),
        rule(
            [Match::Eq(FAMILY, FAMILY4), local()],
            to(false, &[PROTOCOL, DESTINATION_PORT], FORWARDS4),
        ),
        rule(
            [Match::Eq(FAMILY, FAMILY6), local()],
            to(true, &[IP6_DADDR, PROTOCOL, DESTINATION_PORT], FORWARDS_AT6),
        ),
        rule(
            [Match::Eq(FAMILY, FAMILY6), local()],
            to(true, &[PROTOCOL, DESTINATION_PORT], FORWARDS6),
        ),
    ]
}

/// `RTN_LOCAL`, in the machine's byte order.
const LOCAL: [u8; 4] = 2u32.to_ne_bytes();

/// Programs on the host use forwards like any other machine. Its loopback addresses are exempt:
/// they lead nowhere else.
fn own_forwards() -> Vec<Rule> {
    let loopback4 = return_if([
        Match::Eq(FAMILY, FAMILY4),
        Match::MaskedEq(IP_DADDR, &[255, 0, 0, 0], &[127, 0, 0, 0]),
    ]);
    let loopback6 = return_if([Match::Eq(FAMILY, FAMILY6), Match::Eq(IP6_DADDR, LOOPBACK6)]);
    [loopback4, loopback6].into_iter().chain(forwards()).collect()
}

/// A masqueraded packet comes from the VM's own gateway, and security groups cannot judge that
/// address. A rule for the subnet would admit strangers, and a rule for a neighbour would not admit
/// a neighbour that comes through a forwarded port. Here the original source address is known. This
/// chain marks what the groups admit, as the host's own packets are marked, and the bridge lets it
/// in.
fn masked() -> Vec<Rule> {
    let masqueraded = [
        Match::MaskedEq(CT_STATUS, &SOURCE_NAT, &SOURCE_NAT),
        Match::Eq(CT_DIRECTION, &[ORIGINAL]),
        // The bridge recognises ICMP errors by their type.
        Match::MaskedEq(CT_STATE, &RELATED, &[0; 4]),
        Match::MaskedEq(MARK, &HOST_MARK, &[0; 4]),
    ];
    vec![rule(masqueraded, Verdict::Jump("masked_ip"))]
}

fn masked_ip() -> Vec<Rule> {
    vec![
        rule([Match::Eq(FAMILY, FAMILY4)], Verdict::Goto("masked_ip4")),
        rule([Match::Eq(FAMILY, FAMILY6)], Verdict::Goto("masked_ip6")),
    ]
}

/// Takes the sets of ports, of whole protocols, and of all addresses that have either.
fn masked_by(to: Field, from: Field, [ports, protocols, all]: [Set; 3]) -> Vec<Rule> {
    vec![
        rule(
            [in_set(&[OIFNAME, to, from, PROTOCOL, DESTINATION_PORT], ports)],
            Verdict::Goto("vouched"),
        ),
        rule([in_set(&[OIFNAME, to, from, PROTOCOL], protocols)], Verdict::Goto("vouched")),
        drop_if([in_set(&[OIFNAME, to], all)]),
    ]
}

/// After `NF_IP_PRI_NAT_SRC`, 100.
const BEHIND_SOURCE_NAT: i32 = 110;
/// `IPS_SRC_NAT`, in the machine's byte order.
const SOURCE_NAT: [u8; 4] = 16u32.to_ne_bytes();
/// `NF_CT_STATE_BIT` of `IP_CT_RELATED`, likewise.
const RELATED: [u8; 4] = 4u32.to_ne_bytes();
/// `IP_CT_DIR_ORIGINAL`.
const ORIGINAL: u8 = 0;
