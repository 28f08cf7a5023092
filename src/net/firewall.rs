//! Which firewall rules a bridge of ours needs.
//!
//! One table of our own for each bridge, `inet bosh-qemu-<bridge>`, replaced as a whole; no other table is ever
//! touched. Security groups, anti-spoofing and port forwards are further chains and sets of the same table.
//!
//! There is deliberately no chain that accepts forwarded traffic: in nftables every table's chains are asked in turn,
//! so an `accept` of ours can not take back a `drop` of Docker's, ufw's or firewalld's, and without such a `drop` it
//! changes nothing. Looking for those and telling the operator what they want belongs here as well.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::nft::{self, Chain, Family, Hook, IIFNAME, Match, OIFNAME, Place, Rule, Table, Verdict};
use super::plan::{Keeper, Segment, subnet};
use crate::error::Result;
use crate::link_name::LinkName;

/// The table of a segment's bridge, if it needs one. Of all addresses the bridge has, not only the segment's: manifests
/// with several subnets share the bridge.
pub(super) fn table(segment: &Segment, present: &[IpNetwork]) -> Option<Table> {
    let Keeper::Us { addresses, masquerade, closed, .. } = &segment.keeper else { return None };
    let bridge = &segment.bridge;
    let mut chains = Vec::new();
    if *masquerade {
        chains.push(hiding(bridge, present.iter().chain(addresses).copied()));
    }
    if *closed {
        chains.push(closing(bridge));
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
    let mut subnets: Vec<_> = addresses.filter(|address| !is_link_local(address.ip())).map(subnet).collect();
    subnets.sort_unstable();
    subnets.dedup();
    let rule = |subnet| Rule {
        matches: vec![Match::SourceIn(subnet), Match::NotLeavingBy(bridge.clone())],
        verdict: Verdict::Masquerade,
    };
    Chain { name: "postrouting", hook: Some(Hook::SOURCE_NAT), rules: subnets.into_iter().map(rule).collect() }
}

/// Lets nothing pass between the bridge and other links: that the host routes for one network is not for all.
fn closing(bridge: &LinkName) -> Chain {
    let drop = |field| Rule { matches: vec![Match::By(field, bridge.clone())], verdict: Verdict::Drop };
    Chain { name: "forward", hook: Some(Hook::filter(Place::Forward, 0)), rules: vec![drop(IIFNAME), drop(OIFNAME)] }
}

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
        let keeper = Keeper::Us { addresses: Vec::new(), masquerade, closed, uplink: None };
        let bridge = LinkName::parse("bosh-nat0").unwrap();
        let segment = Segment { network: "lab".into(), bridge, mtu: None, vlan: None, isolated: false, keeper };
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
            }
        }
        "#);
        insta::assert_snapshot!(rules(false, true), @r#"
        table inet bosh-qemu-bosh-nat0 {
            chain forward {
                type filter hook forward priority 0; policy accept;
                iifname "bosh-nat0" counter drop
                oifname "bosh-nat0" counter drop
            }
        }
        "#);
        assert_eq!(rules(false, false), "");
    }
}
