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

use super::nft::{self, Chain, Family, Hook, Match, Rule, Table, Verdict};
use crate::error::Result;
use crate::link_name::LinkName;

/// Hides the subnets of `addresses`, all those of the bridge, behind the host. Twice is once.
pub(super) fn ensure_masquerade(bridge: &LinkName, addresses: impl Iterator<Item = IpNetwork>) -> Result<()> {
    let wanted = masquerade(bridge, addresses);
    if nft::holds(&wanted)? { Ok(()) } else { nft::replace(&wanted) }
}

/// Removes all rules for the bridge, if there are any.
pub(super) fn drop_all(bridge: &LinkName) -> Result<()> {
    nft::drop_table(Family::Inet, &table_name(bridge))
}

fn table_name(bridge: &LinkName) -> String {
    format!("bosh-qemu-{bridge}")
}

fn masquerade(bridge: &LinkName, addresses: impl Iterator<Item = IpNetwork>) -> Table {
    let mut subnets: Vec<_> = addresses.filter(|address| !is_link_local(address.ip())).map(subnet).collect();
    subnets.sort_unstable();
    subnets.dedup();
    let rule = |subnet| Rule {
        matches: vec![Match::SourceIn(subnet), Match::NotLeavingBy(bridge.clone())],
        verdict: Verdict::Masquerade,
    };
    let postrouting =
        Chain { name: "postrouting", hook: Some(Hook::SOURCE_NAT), rules: subnets.into_iter().map(rule).collect() };
    Table { family: Family::Inet, name: table_name(bridge), sets: Vec::new(), chains: vec![postrouting] }
}

fn subnet(address: IpNetwork) -> IpNetwork {
    IpNetwork::new(address.network(), address.prefix()).expect("the prefix of an address fits its subnet")
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

    #[test]
    fn the_table_of_a_bridge() {
        let bridge = LinkName::parse("bosh-nat0").unwrap();
        let addresses = ["fd00::1/64", "10.0.2.1/24", "10.0.1.1/24", "fe80::1/64", "10.0.1.254/24"];
        let table = masquerade(&bridge, addresses.iter().map(|text| text.parse().unwrap()));
        insta::assert_snapshot!(table, @r#"
        table inet bosh-qemu-bosh-nat0 {
            chain postrouting {
                type nat hook postrouting priority 100; policy accept;
                ip saddr 10.0.1.0/24 oifname != "bosh-nat0" masquerade
                ip saddr 10.0.2.0/24 oifname != "bosh-nat0" masquerade
                ip6 saddr fd00::/64 oifname != "bosh-nat0" masquerade
            }
        }
        "#);
    }
}
