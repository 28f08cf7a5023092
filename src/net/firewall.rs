//! Which firewall rules a bridge of ours needs.
//!
//! One table of our own for each bridge, `inet bosh-qemu-<bridge>`, replaced as a whole; no other table is ever
//! touched.
//!
//! There is deliberately no chain that accepts forwarded traffic: in nftables every table's chains are asked in turn,
//! so an `accept` of ours can not take back a `drop` of Docker's, ufw's or firewalld's, and without such a `drop` it
//! changes nothing. [`super::coexist`] tells the operator what those want.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::nft::{
    self, CT_STATE, CT_STATUS, Chain, FAMILY, Family, Hook, ICMP_TYPE, ICMP6_TYPE, IIFNAME,
    IP_DADDR, Match, OIFNAME, PROTOCOL, Place, Rule, Table, Verdict,
};
use super::plan::{Keeper, Segment, subnet};
use crate::error::Result;
use crate::link_name::LinkName;

/// The table of a segment's bridge, if it needs one. Of all addresses the bridge has, not only the segment's: manifests
/// with several subnets share the bridge.
pub(super) fn table(segment: &Segment, present: &[IpNetwork]) -> Option<Table> {
    let Keeper::Cpi { addresses, masquerade, closed, services, uplink } = &segment.keeper else {
        return None;
    };
    let bridge = &segment.bridge;
    let mut chains = Vec::new();
    if *masquerade {
        chains.push(hiding(bridge, present.iter().chain(addresses).copied()));
    }
    // The host only carries such a VLAN.
    let apart = uplink.is_some() && addresses.is_empty();
    let own = present.iter().chain(addresses);
    let mut passing = if !*closed && own.clone().any(IpNetwork::is_ipv4) {
        metadata(bridge, own)
    } else {
        Vec::new()
    };
    if *closed || apart || segment.isolated {
        passing.extend(closing(bridge, *closed || apart, segment.isolated));
    }
    chains.push(Chain {
        name: "forward",
        hook: Some(Hook::filter(Place::Forward, 0)),
        rules: passing,
    });
    if apart {
        let rules = vec![Rule {
            matches: vec![Match::By(IIFNAME, bridge.clone())],
            verdict: Verdict::Drop,
        }];
        chains.push(Chain { name: "host", hook: Some(Hook::filter(Place::Input, 0)), rules });
    }
    if let Some(services) = services {
        chains.push(host(bridge, services));
    }
    if !addresses.is_empty() {
        chains.push(speaks(bridge));
    }
    chains.retain(|chain| !chain.rules.is_empty());
    let table = Table { family: Family::Inet, name: table_name(bridge), sets: Vec::new(), chains };
    Some(table).filter(|table| !table.chains.is_empty())
}

/// Removes all rules for the bridge, if there are any.
pub(super) fn drop_all(bridge: &LinkName) -> Result<()> {
    nft::drop_table(Family::Inet, &table_name(bridge))
}

fn table_name(bridge: &LinkName) -> String {
    format!("bosh-qemu-{bridge}")
}

/// Hides the subnets of `addresses` behind the host.
fn hiding(bridge: &LinkName, addresses: impl Iterator<Item = IpNetwork>) -> Chain {
    let mut subnets: Vec<_> =
        addresses.filter(|address| !is_link_local(address.ip())).map(subnet).collect();
    subnets.sort_unstable();
    subnets.dedup();
    let rule = |subnet| Rule {
        matches: vec![Match::SourceIn(subnet), Match::NotLeavingBy(bridge.clone())],
        verdict: Verdict::Masquerade,
    };
    // A VM that uses a forward to its neighbour must get the answer from the host it asked.
    let back = |subnet| Rule {
        matches: vec![
            Match::SourceIn(subnet),
            Match::By(OIFNAME, bridge.clone()),
            Match::Bits(CT_STATUS, &FORWARDED, &FORWARDED),
        ],
        verdict: Verdict::Masquerade,
    };
    let rules =
        subnets.iter().copied().map(rule).chain(subnets.iter().copied().map(back)).collect();
    Chain { name: "postrouting", hook: Some(Hook::SOURCE_NAT), rules }
}

/// Lets nothing pass between the bridge and other links if it is `closed`: that the host routes for one network is not
/// for all. Neighbours that are `isolated` as ports are so by way of the gateway too; else what goes from port to port
/// comes here only through br_netfilter, and is no business of this chain.
fn closing(bridge: &LinkName, closed: bool, isolated: bool) -> Vec<Rule> {
    let by = |field| Match::By(field, bridge.clone());
    let neighbours = if isolated { Verdict::Drop } else { Verdict::Return };
    let mut rules = vec![Rule { matches: vec![by(IIFNAME), by(OIFNAME)], verdict: neighbours }];
    if closed {
        rules.extend(
            [IIFNAME, OIFNAME]
                .map(|field| Rule { matches: vec![by(field)], verdict: Verdict::Drop }),
        );
    }
    rules
}

/// Where this host is a cloud's VM, the cloud tells its credentials to whoever asks 169.254.169.254 as this host, and so to
/// every VM behind it. A router passes on nothing to link-local addresses (RFC 3927 §2.7); Linux would.
fn metadata<'a>(bridge: &LinkName, mut own: impl Iterator<Item = &'a IpNetwork>) -> Vec<Rule> {
    if own.any(|address| address.is_ipv4() && is_link_local(address.ip())) {
        return Vec::new();
    }
    let to_link_local = [
        Match::By(IIFNAME, bridge.clone()),
        Match::Is(FAMILY, &[2]),
        Match::Bits(IP_DADDR, &[255, 255, 0, 0], &[169, 254, 0, 0]),
    ];
    vec![Rule { matches: to_link_local.into(), verdict: Verdict::Drop }]
}

/// What VMs may say to the host itself, by whichever of its addresses: answers, ping and what is served.
fn host(bridge: &LinkName, services: &[(u8, u16)]) -> Chain {
    let rule = |what: Vec<Match>, verdict| {
        let matches = [Match::By(IIFNAME, bridge.clone())].into_iter().chain(what);
        Rule { matches: matches.collect(), verdict }
    };
    let icmp = |family, protocol, kind, first, last| {
        let what = vec![
            Match::Is(FAMILY, family),
            Match::Is(PROTOCOL, protocol),
            Match::Within(kind, first, last),
        ];
        rule(what, Verdict::Return)
    };
    let known = rule(vec![Match::OtherBits(CT_STATE, &FOLLOWED, &[0; 4])], Verdict::Return);
    let pings =
        [icmp(&[2], &[1], ICMP_TYPE, &[8], &[8]), icmp(&[10], &[58], ICMP6_TYPE, &[128], &[128])];
    // No connection has them: neighbours ask and answer.
    let neighbours = icmp(&[10], &[58], ICMP6_TYPE, &[135], &[136]);
    let served = services
        .iter()
        .map(|(protocol, port)| rule(vec![Match::To(*protocol, *port)], Verdict::Return));
    let passed = [known, neighbours].into_iter().chain(pings).chain(served);
    let rules = passed.chain([rule(Vec::new(), Verdict::Drop)]).collect();
    Chain { name: "host", hook: Some(Hook::filter(Place::Input, 0)), rules }
}

/// Marks what the host itself says to VMs, which security groups admit: create-env speaks to its VM. The address would
/// not tell it, for what is masqueraded has it too.
fn speaks(bridge: &LinkName) -> Chain {
    let rules = vec![Rule {
        matches: vec![Match::By(OIFNAME, bridge.clone())],
        verdict: Verdict::Mark(OF_THE_HOST),
    }];
    Chain { name: "speaks", hook: Some(Hook::filter(Place::Output, 0)), rules }
}

/// The bit of a packet's mark for what the host itself says, in the machine's byte order.
pub(super) const OF_THE_HOST: [u8; 4] = 0x1000u32.to_ne_bytes();

/// `NF_CT_STATE_BIT` of `IP_CT_ESTABLISHED` and `IP_CT_RELATED`, in the machine's byte order.
const FOLLOWED: [u8; 4] = 6u32.to_ne_bytes();
/// `IPS_DST_NAT`, likewise.
const FORWARDED: [u8; 4] = 32u32.to_ne_bytes();

/// The kernel gives every IPv6 link such an address; it is never routed.
fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(masquerade: bool, closed: bool) -> String {
        let addresses = ["fd00::1/64", "10.0.2.1/24", "10.0.1.1/24", "fe80::1/64", "10.0.1.254/24"];
        let addresses = addresses.map(|text| text.parse().unwrap()).to_vec();
        let keeper = Keeper::Cpi {
            addresses: Vec::new(),
            masquerade,
            services: (masquerade || closed).then(|| vec![(6, 22)]),
            closed,
            uplink: None,
        };
        let bridge = LinkName::parse("bosh-nat0").unwrap();
        let segment = Segment {
            network: "lab".into(),
            bridge,
            mtu: None,
            vlan: None,
            isolated: false,
            keeper,
        };
        table(&segment, &addresses).map(|table| table.to_string()).unwrap_or_default()
    }

    #[test]
    fn the_table_of_a_bridge() {
        insta::assert_snapshot!(rules(true, false), @r#"
        table inet bosh-qemu-bosh-nat0 {
            chain postrouting {
                type nat hook postrouting priority 100; policy accept;
                ip saddr 10.0.1.0/24 oifname != "bosh-nat0" masquerade
                ip saddr 10.0.2.0/24 oifname != "bosh-nat0" masquerade
                ip6 saddr fd00::/64 oifname != "bosh-nat0" masquerade
                ip saddr 10.0.1.0/24 oifname "bosh-nat0" ct status & 0x00000020 == 0x00000020 masquerade
                ip saddr 10.0.2.0/24 oifname "bosh-nat0" ct status & 0x00000020 == 0x00000020 masquerade
                ip6 saddr fd00::/64 oifname "bosh-nat0" ct status & 0x00000020 == 0x00000020 masquerade
            }
            chain forward {
                type filter hook forward priority 0; policy accept;
                iifname "bosh-nat0" meta nfproto 0x02 ip daddr & 0xffff0000 == 0xa9fe0000 counter drop
            }
            chain host {
                type filter hook input priority 0; policy accept;
                iifname "bosh-nat0" ct state & 0x00000006 != 0x00000000 return
                iifname "bosh-nat0" meta nfproto 0x0a meta l4proto 0x3a icmpv6 type 0x87-0x88 return
                iifname "bosh-nat0" meta nfproto 0x02 meta l4proto 0x01 icmp type 0x08-0x08 return
                iifname "bosh-nat0" meta nfproto 0x0a meta l4proto 0x3a icmpv6 type 0x80-0x80 return
                iifname "bosh-nat0" meta l4proto 6 th dport 22 return
                iifname "bosh-nat0" counter drop
            }
        }
        "#);
        insta::assert_snapshot!(rules(false, true), @r#"
        table inet bosh-qemu-bosh-nat0 {
            chain forward {
                type filter hook forward priority 0; policy accept;
                iifname "bosh-nat0" oifname "bosh-nat0" return
                iifname "bosh-nat0" counter drop
                oifname "bosh-nat0" counter drop
            }
            chain host {
                type filter hook input priority 0; policy accept;
                iifname "bosh-nat0" ct state & 0x00000006 != 0x00000000 return
                iifname "bosh-nat0" meta nfproto 0x0a meta l4proto 0x3a icmpv6 type 0x87-0x88 return
                iifname "bosh-nat0" meta nfproto 0x02 meta l4proto 0x01 icmp type 0x08-0x08 return
                iifname "bosh-nat0" meta nfproto 0x0a meta l4proto 0x3a icmpv6 type 0x80-0x80 return
                iifname "bosh-nat0" meta l4proto 6 th dport 22 return
                iifname "bosh-nat0" counter drop
            }
        }
        "#);
        insta::assert_snapshot!(rules(false, false), @r#"
        table inet bosh-qemu-bosh-nat0 {
            chain forward {
                type filter hook forward priority 0; policy accept;
                iifname "bosh-nat0" meta nfproto 0x02 ip daddr & 0xffff0000 == 0xa9fe0000 counter drop
            }
        }
        "#);
    }
}
