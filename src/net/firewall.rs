//! nftables rules of the bridges that the CPI makes.
//!
//! Each bridge has one table, `inet bosh-qemu-<bridge>`, which is replaced as a whole. No other
//! program's table is touched.
//!
//! No chain here accepts forwarded traffic. nftables consults the chains of every table in turn: an
//! `accept` here could not undo a `drop` of Docker, ufw or firewalld, and without such a `drop` it
//! would change nothing. [`super::host_firewalls`] tells the operator which commands those programs
//! need.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::nft::{
    self, CT_STATE, CT_STATUS, Chain, FAMILY, Family, Hook, HookPoint, ICMP_TYPE, ICMP6_TYPE,
    IIFNAME, IP_DADDR, IP6_DADDR, Match, OIFNAME, PROTOCOL, Rule, Table, Verdict,
};
use super::plan::{Keeper, Segment, subnet};
use crate::error::Result;
use crate::link_name::LinkName;

/// Returns the table of a segment's bridge, if it needs one. Covers `present`, all addresses on the
/// bridge, and not only the segment's: manifests with several subnets share a bridge.
pub(super) fn table(segment: &Segment, present: &[IpNetwork]) -> Option<Table> {
    let Keeper::Cpi { addresses, masquerade, closed, services, uplink } = &segment.keeper else {
        return None;
    };
    let bridge = &segment.bridge;
    let mut chains = Vec::new();
    if *masquerade {
        chains.push(postrouting(bridge, present.iter().chain(addresses).copied()));
    }
    // The host only carries this VLAN and has no address on it.
    let carries_vlan_only = uplink.is_some() && addresses.is_empty();
    let own = present.iter().chain(addresses);
    let mut forward_rules =
        if *closed { Vec::new() } else { drop_metadata_services(bridge, &own.collect::<Vec<_>>()) };
    if *closed || carries_vlan_only || segment.isolated {
        forward_rules.extend(isolate_bridge(
            bridge,
            *closed || carries_vlan_only,
            segment.isolated,
        ));
    }
    chains.push(Chain {
        name: "forward",
        hook: Some(Hook::filter(HookPoint::Forward, 0)),
        rules: forward_rules,
    });
    if carries_vlan_only {
        let rules = vec![Rule {
            matches: vec![Match::Link(IIFNAME, bridge.clone())],
            verdict: Verdict::Drop,
        }];
        chains.push(Chain { name: "host", hook: Some(Hook::filter(HookPoint::Input, 0)), rules });
    }
    if let Some(services) = services {
        chains.push(host_input(bridge, services));
    }
    if !addresses.is_empty() {
        chains.push(mark_host_output(bridge));
    }
    chains.retain(|chain| !chain.rules.is_empty());
    let table = Table { family: Family::Inet, name: table_name(bridge), sets: Vec::new(), chains };
    Some(table).filter(|table| !table.chains.is_empty())
}

/// Removes the bridge's table, if it exists.
pub(super) fn remove_table(bridge: &LinkName) -> Result<()> {
    nft::drop_table(Family::Inet, &table_name(bridge))
}

fn table_name(bridge: &LinkName) -> String {
    format!("bosh-qemu-{bridge}")
}

/// Masquerades the subnets of `addresses` behind the host's address.
fn postrouting(bridge: &LinkName, addresses: impl Iterator<Item = IpNetwork>) -> Chain {
    let mut subnets: Vec<_> =
        addresses.filter(|address| !is_link_local(address.ip())).map(subnet).collect();
    subnets.sort_unstable();
    subnets.dedup();
    let rule = |subnet| Rule {
        matches: vec![Match::SourceIn(subnet), Match::NotOutput(bridge.clone())],
        verdict: Verdict::Masquerade,
    };
    // A VM may reach its neighbour through a forwarded port of the host. The answer must then come
    // from the host.
    let hairpin = |subnet| Rule {
        matches: vec![
            Match::SourceIn(subnet),
            Match::Link(OIFNAME, bridge.clone()),
            Match::MaskedEq(CT_STATUS, &CT_STATUS_DNAT, &CT_STATUS_DNAT),
        ],
        verdict: Verdict::Masquerade,
    };
    let rules =
        subnets.iter().copied().map(rule).chain(subnets.iter().copied().map(hairpin)).collect();
    Chain { name: "postrouting", hook: Some(Hook::SOURCE_NAT), rules }
}

/// Returns the rules that stop forwarding. If `closed`, nothing passes between the bridge and other
/// links: `ip_forward` for one network must not open another. If `isolated`, VMs do not reach each
/// other through the gateway either. Else, frames between ports come here only through
/// br_netfilter, and this chain lets them pass.
fn isolate_bridge(bridge: &LinkName, closed: bool, isolated: bool) -> Vec<Rule> {
    let by = |field| Match::Link(field, bridge.clone());
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

/// Returns the rules that drop packets to metadata services of clouds, but for those inside the
/// bridge's own subnets. On a host that is itself a cloud's VM, the cloud gives the host's
/// credentials to every request there, and so to every VM behind the host. Most services have an
/// IPv4 link-local address. A router forwards nothing to these (RFC 3927 §2.7), but Linux does.
fn drop_metadata_services(bridge: &LinkName, own: &[&IpNetwork]) -> Vec<Rule> {
    let drop = |family, to| Rule {
        matches: vec![Match::Link(IIFNAME, bridge.clone()), Match::Eq(FAMILY, family), to],
        verdict: Verdict::Drop,
    };
    let is_on_bridge = |ip: IpAddr| own.iter().any(|address| address.contains(ip));
    let mut rules = Vec::new();
    if own.iter().any(|address| address.is_ipv4()) {
        if !own.iter().any(|address| address.is_ipv4() && is_link_local(address.ip())) {
            rules.push(drop(&[2], Match::MaskedEq(IP_DADDR, &[255, 255, 0, 0], &[169, 254, 0, 0])));
        }
        let services = METADATA4.iter().filter(|ip| !is_on_bridge(IpAddr::from(**ip)));
        rules.extend(services.map(|ip| drop(&[2], Match::Eq(IP_DADDR, ip))));
    }
    // The kernel gives the bridge a link-local address, with any network.
    if own.iter().any(|address| address.is_ipv6() && !is_link_local(address.ip())) {
        let services = METADATA6.iter().filter(|ip| !is_on_bridge(IpAddr::from(**ip)));
        rules.extend(services.map(|ip| drop(&[10], Match::Eq(IP6_DADDR, ip))));
    }
    rules
}

/// Metadata services of Azure (168.63.129.16) and Alibaba Cloud (100.100.100.200).
const METADATA4: [[u8; 4]; 2] = [[168, 63, 129, 16], [100, 100, 100, 200]];

/// Metadata services of AWS (fd00:ec2::254) and Google Cloud (fd20:ce::254).
const METADATA6: [[u8; 16]; 2] = [
    [0xfd, 0, 0x0e, 0xc2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x02, 0x54],
    [0xfd, 0x20, 0, 0xce, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x02, 0x54],
];

/// Returns the chain of packets from VMs to any address of the host: it passes answers, ping and
/// `services`, and drops the rest.
fn host_input(bridge: &LinkName, services: &[(u8, u16)]) -> Chain {
    let rule = |what: Vec<Match>, verdict| {
        let matches = [Match::Link(IIFNAME, bridge.clone())].into_iter().chain(what);
        Rule { matches: matches.collect(), verdict }
    };
    let icmp = |family, protocol, kind, first, last| {
        let matches = vec![
            Match::Eq(FAMILY, family),
            Match::Eq(PROTOCOL, protocol),
            Match::InRange(kind, first, last),
        ];
        rule(matches, Verdict::Return)
    };
    let answers = rule(
        vec![Match::MaskedNe(CT_STATE, &CT_STATE_ESTABLISHED_OR_RELATED, &[0; 4])],
        Verdict::Return,
    );
    let pings =
        [icmp(&[2], &[1], ICMP_TYPE, &[8], &[8]), icmp(&[10], &[58], ICMP6_TYPE, &[128], &[128])];
    // Neighbour solicitations and advertisements belong to no connection.
    let neighbours = icmp(&[10], &[58], ICMP6_TYPE, &[135], &[136]);
    let served = services.iter().map(|(protocol, port)| {
        rule(vec![Match::DestinationPort(*protocol, *port)], Verdict::Return)
    });
    let passed = [answers, neighbours].into_iter().chain(pings).chain(served);
    let rules = passed.chain([rule(Vec::new(), Verdict::Drop)]).collect();
    Chain { name: "host", hook: Some(Hook::filter(HookPoint::Input, 0)), rules }
}

/// Returns the chain that marks packets the host itself sends to VMs. Security groups admit these,
/// because create-env speaks to its VM. The source address does not identify them: masqueraded
/// packets have it too.
fn mark_host_output(bridge: &LinkName) -> Chain {
    let rules = vec![Rule {
        matches: vec![Match::Link(OIFNAME, bridge.clone())],
        verdict: Verdict::SetMark(HOST_MARK),
    }];
    Chain { name: "speaks", hook: Some(Hook::filter(HookPoint::Output, 0)), rules }
}

/// Bit of the packet mark for what the host itself sends, in the machine's byte order.
pub(super) const HOST_MARK: [u8; 4] = 0x1000u32.to_ne_bytes();

/// `NF_CT_STATE_BIT` of `IP_CT_ESTABLISHED` and `IP_CT_RELATED`, in the machine's byte order.
const CT_STATE_ESTABLISHED_OR_RELATED: [u8; 4] = 6u32.to_ne_bytes();
/// `IPS_DST_NAT`, likewise.
const CT_STATUS_DNAT: [u8; 4] = 32u32.to_ne_bytes();

/// Whether the address is link-local. The kernel gives every IPv6 link such an address, and never
/// routes it.
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
                ip saddr 10.0.1.0/24 oifname "bosh-nat0" ct status & dnat == dnat masquerade
                ip saddr 10.0.2.0/24 oifname "bosh-nat0" ct status & dnat == dnat masquerade
                ip6 saddr fd00::/64 oifname "bosh-nat0" ct status & dnat == dnat masquerade
            }
            chain forward {
                type filter hook forward priority 0; policy accept;
                iifname "bosh-nat0" meta nfproto ipv4 ip daddr & 255.255.0.0 == 169.254.0.0 counter drop
                iifname "bosh-nat0" meta nfproto ipv4 ip daddr 168.63.129.16 counter drop
                iifname "bosh-nat0" meta nfproto ipv4 ip daddr 100.100.100.200 counter drop
                iifname "bosh-nat0" meta nfproto ipv6 ip6 daddr fd00:ec2::254 counter drop
                iifname "bosh-nat0" meta nfproto ipv6 ip6 daddr fd20:ce::254 counter drop
            }
            chain host {
                type filter hook input priority 0; policy accept;
                iifname "bosh-nat0" ct state & (established | related) != 0 return
                iifname "bosh-nat0" meta nfproto ipv6 meta l4proto ipv6-icmp icmpv6 type 135-136 return
                iifname "bosh-nat0" meta nfproto ipv4 meta l4proto icmp icmp type 8 return
                iifname "bosh-nat0" meta nfproto ipv6 meta l4proto ipv6-icmp icmpv6 type 128 return
                iifname "bosh-nat0" tcp dport 22 return
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
                iifname "bosh-nat0" ct state & (established | related) != 0 return
                iifname "bosh-nat0" meta nfproto ipv6 meta l4proto ipv6-icmp icmpv6 type 135-136 return
                iifname "bosh-nat0" meta nfproto ipv4 meta l4proto icmp icmp type 8 return
                iifname "bosh-nat0" meta nfproto ipv6 meta l4proto ipv6-icmp icmpv6 type 128 return
                iifname "bosh-nat0" tcp dport 22 return
                iifname "bosh-nat0" counter drop
            }
        }
        "#);
        insta::assert_snapshot!(rules(false, false), @r#"
        table inet bosh-qemu-bosh-nat0 {
            chain forward {
                type filter hook forward priority 0; policy accept;
                iifname "bosh-nat0" meta nfproto ipv4 ip daddr & 255.255.0.0 == 169.254.0.0 counter drop
                iifname "bosh-nat0" meta nfproto ipv4 ip daddr 168.63.129.16 counter drop
                iifname "bosh-nat0" meta nfproto ipv4 ip daddr 100.100.100.200 counter drop
                iifname "bosh-nat0" meta nfproto ipv6 ip6 daddr fd00:ec2::254 counter drop
                iifname "bosh-nat0" meta nfproto ipv6 ip6 daddr fd20:ce::254 counter drop
            }
        }
        "#);
    }
}
