//! Elements that overlapping rules produce.

use super::*;

fn net(text: &str) -> IpNetwork {
    text.parse().unwrap()
}

#[test]
fn overlapping_rules_become_disjoint_elements() {
    let wanted = [
        (net("10.0.0.0/8"), (80, 90)),
        (net("10.1.0.0/16"), (85, 100)),
        (net("10.1.0.0/16"), (1, 10)),
        (net("10.1.2.0/24"), (5, 95)),
        (net("10.0.0.0/8"), (91, 92)),
        (net("192.0.2.0/24"), (80, 80)),
    ];
    let elements: Vec<_> = disjoint(&wanted)
        .iter()
        .map(|(source, (first, last))| format!("{source} {first}-{last}"))
        .collect();
    assert_eq!(
        elements,
        [
            "10.0.0.0/8 80-92",
            "10.1.0.0/16 1-10",
            "10.1.0.0/16 93-100",
            "10.1.2.0/24 11-79",
            "192.0.2.0/24 80-80"
        ]
    );
}

#[test]
fn a_subnet_replaces_the_addresses_inside_it() {
    let subnets = ["10.0.0.5/32", "10.0.0.0/28", "10.0.0.16/32", "fd00::5/128"].map(net);
    let left: Vec<_> = outermost(subnets.into_iter()).iter().map(ToString::to_string).collect();
    assert_eq!(left, ["10.0.0.0/28", "10.0.0.16/32", "fd00::5/128"]);
}

#[test]
fn the_link_local_address_of_a_mac() {
    assert_eq!(
        link_local("02:11:22:33:44:55".parse().unwrap()).to_string(),
        "fe80::11:22ff:fe33:4455/128"
    );
}
