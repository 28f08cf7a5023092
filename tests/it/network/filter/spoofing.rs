//! Anti-spoofing: a guest sends only from its own addresses.

use bosh_qemu_cpi::store::nic_rules::NicRules;

use super::{ARP, BRIDGE, Bridge, ICMP6, IP4, IP6, UDP, bridges, filtered, mac};
use crate::support::frames::{BROADCAST, Mac, arp, ethernet, fragment, ip4, ip6, nd, rs, udp};
use crate::support::host::eventually;

#[test]
fn send_ipv4_with_spoofed_source_is_dropped() {
    bridges().for_each(|bridge| assert_ipv4_spoofs_dropped(&bridge));
}

fn assert_ipv4_spoofs_dropped(bridge: &Bridge) {
    let guest = bridge.guest(1, filtered(&["10.0.0.1", "10.0.0.32/28"]));
    let other = bridge.guest(2, filtered(&["10.0.0.2"]));
    let frame = |payload: &[u8]| ethernet(BROADCAST, mac(1), IP4, payload);
    let asks = |sender: (Mac, &str)| ethernet(BROADCAST, mac(1), ARP, &arp(1, sender, "10.0.0.2"));
    let probes = |target| ethernet(BROADCAST, mac(1), ARP, &arp(1, (mac(1), "0.0.0.0"), target));

    bridge.assert_passes(&guest, &other, &frame(&ip4("10.0.0.1", "10.0.0.2", UDP, &udp(1000, 53))));
    bridge.assert_passes(
        &guest,
        &other,
        &frame(&ip4("10.0.0.47", "10.0.0.2", UDP, &udp(1000, 53))),
    );
    bridge.assert_passes(&guest, &other, &asks((mac(1), "10.0.0.1")));
    bridge.assert_passes(&guest, &other, &asks((mac(1), "10.0.0.32")));
    bridge.assert_passes(&guest, &other, &probes("10.0.0.1"));
    bridge.assert_passes(&guest, &other, &probes("10.0.0.47"));
    bridge.assert_passes(
        &guest,
        &other,
        &frame(&ip4("10.0.0.1", "224.0.0.22", 2, &[0x22, 0, 0, 0, 0, 0, 0, 0])),
    );

    let spoofs = [
        ("MAC", ethernet(BROADCAST, mac(9), IP4, &ip4("10.0.0.1", "10.0.0.2", UDP, &udp(1, 53)))),
        ("IP", frame(&ip4("10.0.0.2", "10.0.0.2", UDP, &udp(1, 53)))),
        ("IP beside its block", frame(&ip4("10.0.0.48", "10.0.0.2", UDP, &udp(1, 53)))),
        ("unspecified IP", frame(&ip4("0.0.0.0", "255.255.255.255", UDP, &udp(68, 67)))),
        ("DHCP server", frame(&ip4("10.0.0.1", "255.255.255.255", UDP, &udp(67, 68)))),
        ("probe of another address", probes("10.0.0.2")),
        ("IGMP query", frame(&ip4("10.0.0.1", "224.0.0.1", 2, &[0x11, 0, 0, 0, 0, 0, 0, 0]))),
        (
            "multicast router",
            frame(&ip4("10.0.0.1", "224.0.0.106", 2, &[0x30, 0, 0, 0, 0, 0, 0, 0])),
        ),
        ("PIM", frame(&ip4("10.0.0.1", "224.0.0.13", 103, &[0x20, 0, 0, 0]))),
        ("ARP sender's IP", asks((mac(1), "10.0.0.2"))),
        ("ARP sender's MAC", asks((mac(9), "10.0.0.1"))),
        ("ARP of another kind", ethernet(BROADCAST, mac(1), ARP, &[0, 1, 8, 0, 6, 16, 0, 1])),
        (
            "tagged frame",
            ethernet(
                BROADCAST,
                mac(1),
                0x8100,
                &[&[0, 5, 8, 0][..], &ip4("10.0.0.1", "10.0.0.2", UDP, &udp(1, 53))].concat(),
            ),
        ),
        ("frame of another type", ethernet(BROADCAST, mac(1), 0x88cc, b"lldp")),
    ];
    for (what, spoofed) in &spoofs {
        bridge.assert_dropped(&guest, &other, what, spoofed);
    }
}

/// The kernel names no protocol for these packets, but Debian's dhclient takes such an offer.
#[test]
fn send_malformed_ipv4_is_dropped() {
    for bridge in bridges() {
        let settled = bridge.guest(1, filtered(&["10.0.0.1"]));
        let roaming = bridge.guest(2, filtered(&[]));
        let other = bridge.guest(3, filtered(&["10.0.0.3"]));
        let packets = [
            ("DHCP offer", ip4("10.0.0.1", "255.255.255.255", UDP, &udp(67, 68))),
            ("IGMP query", ip4("10.0.0.1", "224.0.0.1", 2, &[0x11, 0, 0, 0, 0, 0, 0, 0])),
            ("PIM", ip4("10.0.0.1", "224.0.0.13", 103, &[0x20, 0, 0, 0])),
            ("datagram", ip4("10.0.0.1", "10.0.0.3", UDP, &udp(1000, 53))),
        ];
        for (what, packet) in &packets {
            for (how, malformed) in malformed(packet) {
                for (guest, from) in [(&settled, mac(1)), (&roaming, mac(2))] {
                    let frame = ethernet(BROADCAST, from, IP4, &malformed);
                    bridge.assert_dropped(guest, &other, &format!("{what} with {how}"), &frame);
                }
            }
        }
    }
}

/// The IPv4 packet with each fault for which the kernel finds no protocol in it.
fn malformed(packet: &[u8]) -> Vec<(String, Vec<u8>)> {
    let head = |first: u8| [&[first], &packet[1..]].concat();
    let of_length = |length: usize| {
        let [high, low] = u16::try_from(length).unwrap().to_be_bytes();
        [&packet[..2], &[high, low], &packet[4..]].concat()
    };
    let mut all: Vec<_> = [0, 1, 19, packet.len() + 1, 65535]
        .map(|length| (format!("total length {length}"), of_length(length)))
        .into();
    all.push(("header length 4".into(), head(0x44)));
    all.push(("header length 15".into(), head(0x4f)));
    all.push(("version 5".into(), head(0x55)));
    all.push(("half a header".into(), packet[..19].to_vec()));
    all
}

#[test]
fn send_from_allowed_address_passes() {
    for bridge in bridges() {
        let allowed =
            ["10.0.0.100", "10.0.1.0/24", "fd00::100"].map(|text| text.parse().unwrap()).to_vec();
        let guest = bridge.guest(1, NicRules { allowed, ..filtered(&["10.0.0.1", "fd00::1"]) });
        let other = bridge.guest(2, filtered(&["10.0.0.2", "fd00::2"]));
        let four = |from: &str| {
            ethernet(BROADCAST, mac(1), IP4, &ip4(from, "10.0.0.2", UDP, &udp(1000, 53)))
        };
        let asks =
            |from: &str| ethernet(BROADCAST, mac(1), ARP, &arp(1, (mac(1), from), "10.0.0.2"));
        let six = |from: &str| {
            ethernet(BROADCAST, mac(1), IP6, &ip6(from, "fd00::2", UDP, &udp(1000, 53)))
        };
        let tells = |target: &str| {
            let advertisement = nd(136, target, Some((2, mac(1))));
            ethernet(BROADCAST, mac(1), IP6, &ip6("fd00::1", "ff02::1", ICMP6, &advertisement))
        };
        for from in ["10.0.0.1", "10.0.0.100", "10.0.1.7"] {
            bridge.assert_passes(&guest, &other, &four(from));
            bridge.assert_passes(&guest, &other, &asks(from));
        }
        for from in ["fd00::1", "fd00::100"] {
            bridge.assert_passes(&guest, &other, &six(from));
            bridge.assert_passes(&guest, &other, &tells(from));
        }
        bridge.assert_dropped(&guest, &other, "IP beside it", &four("10.0.0.101"));
        bridge.assert_dropped(&guest, &other, "ARP sender beside it", &asks("10.0.2.0"));
        bridge.assert_dropped(&guest, &other, "IPv6 beside it", &six("fd00::101"));
        bridge.assert_dropped(&guest, &other, "target beside it", &tells("fd00::101"));
    }
}

#[test]
fn send_ipv6_with_spoofed_source_is_dropped() {
    for bridge in bridges() {
        let guest = bridge.guest(1, filtered(&["fd00::1", "fd00:1::/80"]));
        let other = bridge.guest(2, filtered(&["fd00::2"]));
        let frame = |payload: &[u8]| ethernet(BROADCAST, mac(1), IP6, payload);
        let icmp = |from: &str, message: &[u8]| frame(&ip6(from, "ff02::1", ICMP6, message));
        let (own, foreign) = (Some((2, mac(1))), Some((2, mac(9))));
        const LINK_LOCAL: &str = "fe80::ff:fe00:1";

        bridge.assert_passes(
            &guest,
            &other,
            &frame(&ip6("fd00::1", "fd00::2", UDP, &udp(1000, 53))),
        );
        bridge.assert_passes(
            &guest,
            &other,
            &frame(&ip6("fd00:1::7", "fd00::2", UDP, &udp(1000, 53))),
        );
        bridge.assert_passes(&guest, &other, &icmp("::", &nd(135, "fd00::1", None)));
        bridge.assert_passes(
            &guest,
            &other,
            &icmp("fd00::1", &nd(135, "fd00::2", Some((1, mac(1))))),
        );
        bridge.assert_passes(&guest, &other, &icmp("fd00::1", &nd(136, "fd00::1", own)));
        bridge.assert_passes(&guest, &other, &icmp(LINK_LOCAL, &nd(136, "fd00:1::7", own)));
        bridge.assert_passes(&guest, &other, &icmp("fd00::1", &nd(135, "fd00::2", None)));
        bridge.assert_passes(
            &guest,
            &other,
            &icmp("::", &[nd(135, "fd00::1", None), vec![14, 1, 0, 0, 0, 0, 0, 0]].concat()),
        );
        bridge.assert_passes(&guest, &other, &icmp(LINK_LOCAL, &rs(&[])));
        bridge.assert_passes(
            &guest,
            &other,
            &icmp(LINK_LOCAL, &rs(&[&[1, 1][..], &mac(1)].concat())),
        );
        // A large ping in two fragments, which br_netfilter would reassemble.
        let large = [
            fragment("fd00::1", ICMP6, 0, true, &[128, 0, 0, 0, 0, 1, 0, 1]),
            fragment("fd00::1", ICMP6, 8, false, b"and more"),
        ];
        for part in large.iter().filter(|_| !bridge.is_called) {
            bridge.assert_passes(&guest, &other, &frame(part));
        }

        let spoofs = [
            ("IP", frame(&ip6("fd00::2", "fd00::2", UDP, &udp(1, 53)))),
            ("IP beside its block", frame(&ip6("fd00:1::1:0:0:7", "fd00::2", UDP, &udp(1, 53)))),
            ("DHCPv6 server", frame(&ip6("fd00::1", "fd00::2", UDP, &udp(547, 546)))),
            ("router advertisement", icmp(LINK_LOCAL, &nd(134, "::", None))),
            ("redirect", icmp(LINK_LOCAL, &nd(137, "::", None))),
            ("advertised target", icmp("fd00::1", &nd(136, "fd00::2", own))),
            ("advertised MAC", icmp("fd00::1", &nd(136, "fd00::1", foreign))),
            ("advertiser", icmp("fd00::2", &nd(136, "fd00::1", own))),
            (
                "second option",
                icmp("fd00::1", &[nd(136, "fd00::1", own), vec![2, 1], mac(9).to_vec()].concat()),
            ),
            (
                "option that hides another",
                icmp("fd00::1", &[nd(136, "fd00::1", Some((14, mac(1)))), vec![2, 1]].concat()),
            ),
            ("solicitor's MAC", icmp("fd00::1", &nd(135, "fd00::2", Some((1, mac(9)))))),
            ("solicitor", icmp("fd00::2", &nd(135, "fd00::1", None))),
            ("probe of another address", icmp("::", &nd(135, "fd00::2", None))),
            ("solicitor's MAC after another option", {
                let nonce = [14, 1, 0, 0, 0, 0, 0, 0];
                icmp(
                    "fd00::1",
                    &[nd(135, "fd00::2", None), nonce.to_vec(), vec![1, 1], mac(9).to_vec()]
                        .concat(),
                )
            }),
            ("solicitor's second option", {
                icmp(
                    "fd00::1",
                    &[nd(135, "fd00::2", Some((1, mac(1)))), vec![1, 1], mac(9).to_vec()].concat(),
                )
            }),
            (
                "solicitor's MAC in a router solicitation",
                icmp(LINK_LOCAL, &rs(&[&[1, 1][..], &mac(9)].concat())),
            ),
            ("listener query", icmp(LINK_LOCAL, &nd(130, "::", None))),
            ("inverse advertisement", icmp(LINK_LOCAL, &nd(142, "::", None))),
            ("certificate", icmp(LINK_LOCAL, &nd(149, "::", None))),
            ("multicast router", icmp(LINK_LOCAL, &nd(151, "::", None))),
            ("PIM", frame(&ip6("fd00::1", "ff02::d", 103, &[0x20, 0, 0, 0]))),
            ("advertisement cut off", icmp("fd00::1", &nd(136, "fd00::2", own)[..8])),
            ("advertisement in a tiny fragment", {
                frame(&fragment("fd00::1", ICMP6, 0, true, &nd(136, "fd00::2", foreign)[..8]))
            }),
            ("advertisement whose options go on", {
                frame(&fragment("fd00::1", ICMP6, 0, true, &nd(136, "fd00::1", own)))
            }),
            ("fragment that ends in an option header", {
                frame(&fragment("fd00::1", 60, 0, true, &[ICMP6, 1, 1, 4, 0, 0, 0, 0]))
            }),
            ("fragment that ends before its own header", {
                frame(&fragment("fd00::1", 60, 0, true, &[ICMP6, 0, 1, 4, 0, 0, 0, 0]))
            }),
            ("hop-by-hop header before an advertisement", {
                let behind = [&[ICMP6, 0, 1, 4, 0, 0, 0, 0][..], &nd(134, "::", None)].concat();
                frame(&ip6(LINK_LOCAL, "ff02::1", 0, &behind))
            }),
        ];
        for (what, spoofed) in &spoofs {
            bridge.assert_dropped(&guest, &other, what, spoofed);
        }
    }
}

#[test]
fn send_from_dhcp_guest_with_foreign_mac_is_dropped() {
    for bridge in bridges() {
        let guest = bridge.guest(1, filtered(&[]));
        let other = bridge.guest(2, filtered(&["10.0.0.2"]));
        let frame = |from: Mac, payload: &[u8]| ethernet(BROADCAST, from, IP4, payload);
        let asks = ip4("0.0.0.0", "255.255.255.255", UDP, &udp(68, 67));
        bridge.assert_passes(&guest, &other, &frame(mac(1), &asks));
        bridge.assert_passes(
            &guest,
            &other,
            &ethernet(BROADCAST, mac(1), ARP, &arp(1, (mac(1), "10.0.0.77"), "10.0.0.2")),
        );
        bridge.assert_dropped(&guest, &other, "MAC", &frame(mac(9), &asks));
        bridge.assert_dropped(
            &guest,
            &other,
            "DHCP server",
            &frame(mac(1), &ip4("10.0.0.77", "10.0.0.2", UDP, &udp(67, 68))),
        );
    }
}

#[test]
fn send_to_bridge_group_address_is_dropped() {
    for bridge in bridges() {
        bridge.host.ip(&format!("address add 10.0.0.254/24 dev {BRIDGE}"));
        let guest = bridge.guest(1, filtered(&["10.0.0.1"]));
        let other = bridge.guest(2, filtered(&["10.0.0.2"]));
        let datagram = ip4("10.0.0.1", "10.0.0.254", UDP, &udp(1, 53));
        let asks = |ip| arp(1, (mac(1), ip), "10.0.0.254");
        // Bridges themselves drop frames to 01.
        for last in (0..=0x0f).filter(|last| *last != 1) {
            for (what, kind, payload) in [
                ("datagram", IP4, datagram.clone()),
                ("ARP", ARP, asks("10.0.0.1")),
                ("ARP from another address", ARP, asks("10.0.0.66")),
            ] {
                let frame = ethernet(nearest(last), mac(1), kind, &payload);
                bridge.assert_dropped(&guest, &other, &format!("{what} to {last:02x}"), &frame);
            }
        }
        assert_eq!(bridge.host.ip("neighbour show"), "");
    }
}

#[test]
fn send_bpdu_is_dropped_on_a_bridge_with_stp() {
    let Some(bridge) = Bridge::new(false) else { return };
    bridge.host.ip(&format!("link set {BRIDGE} type bridge forward_delay 200 stp_state 1"));
    let guest = bridge.guest(1, filtered(&["10.0.0.1"]));
    // A configuration message of a root bridge with the highest priority (IEEE 802.1D §9.3.1).
    let root = [&[0, 0][..], &mac(1)].concat();
    let times = [0, 0, 20, 0, 2, 0, 15, 0];
    let message =
        [&[0x42, 0x42, 3, 0, 0, 0, 0, 0][..], &root, &[0; 4], &root, &[0x80, 1, 0], &times]
            .concat();
    let frame = ethernet(nearest(0), mac(1), message.len() as u16, &message);
    let before = bridge.drops();
    // A port passes nothing, and the rules count nothing, for the first seconds.
    eventually("a counted drop", || {
        guest.wire.send(&frame).unwrap();
        (bridge.drops() > before).then_some(())
    });
    let link = bridge.host.link(BRIDGE).unwrap();
    let settings = &link["linkinfo"]["info_data"];
    assert_eq!(settings["root_id"], settings["bridge_id"]);
}

/// A group address that bridges do not forward (IEEE 802.1Q, table 8-1).
fn nearest(last: u8) -> Mac {
    [1, 0x80, 0xc2, 0, 0, last]
}

#[test]
fn send_with_foreign_mac_teaches_the_bridge_nothing() {
    for bridge in bridges() {
        let guest = bridge.guest(1, filtered(&["10.0.0.1"]));
        let other = bridge.guest(2, filtered(&["10.0.0.2"]));
        let free = bridge.guest(3, NicRules::default());
        let port_of = |mac: &str| {
            let list = || {
                std::process::Command::new("bridge")
                    .args(["-json", "fdb", "show"])
                    .output()
                    .unwrap()
            };
            let list: serde_json::Value =
                serde_json::from_slice(&bridge.host.run(list).stdout).unwrap();
            let entry = list
                .as_array()
                .unwrap()
                .iter()
                .find(|entry| entry["mac"] == mac && entry["master"] == BRIDGE);
            entry.map(|entry| entry["ifname"].as_str().unwrap().to_owned())
        };
        let payload = ip4("10.0.0.1", "10.0.0.2", UDP, &udp(1, 53));
        for last in [0x0e, 0x02, 0x03, 0x0d, 0x0f, 0x00] {
            for from in [mac(2), mac(9)] {
                guest.wire.send(&ethernet(nearest(last), from, IP4, &payload)).unwrap();
            }
        }
        // Further frames from the filtered guest, and from an unfiltered guest that uses the MAC of
        // another.
        bridge.assert_passes(&guest, &other, &ethernet(mac(2), mac(1), IP4, &payload));
        bridge.assert_passes(&free, &other, &ethernet(BROADCAST, mac(2), IP4, &payload));
        bridge.assert_passes(&free, &other, &ethernet(BROADCAST, mac(8), IP4, &payload));
        assert_eq!(port_of("02:00:00:00:00:01").as_deref(), Some("bqport1"));
        assert_eq!(port_of("02:00:00:00:00:02").as_deref(), Some("bqport2"));
        assert_eq!(
            port_of("02:00:00:00:00:08").as_deref(),
            Some("bqport3"),
            "an unfiltered MAC is learnt"
        );
        assert_eq!(port_of("02:00:00:00:00:09"), None);
    }
}
