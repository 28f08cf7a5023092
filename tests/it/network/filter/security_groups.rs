//! Packets that security groups admit to a guest.

use bosh_qemu_cpi::store::nic_rules::NicRules;

use super::{ARP, ICMP6, IP4, IP6, TCP, UDP, admits, bridges, filtered, mac};
use crate::support::frames::{BROADCAST, arp, ethernet, ip4, ip6, nd, tcp, udp};

/// Protocol numbers of IANA.
const OSPF: u8 = 89;
const VRRP: u8 = 112;

#[test]
fn send_to_grouped_guest_passes_only_if_admitted() {
    for bridge in bridges() {
        let tcp_ports = [("0.0.0.0/0", TCP, Some((80, 90))), ("10.0.0.0/24", TCP, Some((85, 95)))];
        let others = [
            ("10.0.0.0/24", 1, None),
            ("10.0.0.0/24", VRRP, None),
            ("fd00::/64", OSPF, None),
            ("fd00::/64", UDP, Some((53, 53))),
        ];
        let guest = bridge.guest(1, admits(&[&tcp_ports[..], &others].concat()));
        let other = bridge.guest(2, NicRules::default());
        let to4 = |from: &str, protocol, payload: &[u8]| {
            ethernet(mac(1), mac(2), IP4, &ip4(from, "10.0.0.1", protocol, payload))
        };
        let to6 = |from: &str, protocol, payload: &[u8]| {
            ethernet(mac(1), mac(2), IP6, &ip6(from, "fd00::1", protocol, payload))
        };
        let ask4 = |payload: &[u8]| {
            ethernet(mac(2), mac(1), IP4, &ip4("10.0.0.1", "10.0.0.2", UDP, payload))
        };

        for frame in [
            to4("192.0.2.1", TCP, &tcp(1000, 80, 2)),
            to4("10.0.0.2", TCP, &tcp(1000, 95, 2)),
            to4("10.0.0.2", TCP, &tcp(1000, 22, 18)),
            to4("10.0.0.2", 1, &[8, 0, 0, 0, 0, 0, 0, 0]),
            to4("192.0.2.1", 1, &[3, 1, 0, 0, 0, 0, 0, 0]),
            ethernet(
                BROADCAST,
                mac(2),
                IP4,
                &ip4("10.0.0.2", "224.0.0.18", VRRP, &[0x31, 7, 100, 1]),
            ),
            to6("fd00::2", UDP, &udp(1000, 53)),
            to6("fd00::2", OSPF, &[3, 1, 0, 4]),
            to6("fd00::2", ICMP6, &nd(135, "fd00::1", None)),
            ethernet(BROADCAST, mac(2), ARP, &arp(1, (mac(2), "10.0.0.2"), "10.0.0.1")),
        ] {
            bridge.assert_passes(&other, &guest, &frame);
        }
        for (what, frame) in [
            ("port", to4("10.0.0.2", TCP, &tcp(1000, 96, 2))),
            ("port from there", to4("192.0.2.1", TCP, &tcp(1000, 91, 2))),
            ("datagram", to4("10.0.0.2", UDP, &udp(53, 1000))),
            ("ping", to4("192.0.2.1", 1, &[8, 0, 0, 0, 0, 0, 0, 0])),
            ("IPv6 source", to6("fd01::2", UDP, &udp(1000, 53))),
            ("protocol", to4("10.0.0.2", 132, &tcp(1, 80, 0))),
            ("protocol with IPv4", to4("10.0.0.2", OSPF, &[3, 1, 0, 4])),
            ("protocol from elsewhere", to4("192.0.2.1", VRRP, &[0x31, 7, 100, 1])),
        ] {
            bridge.assert_dropped(&other, &guest, what, &frame);
        }
        // Without br_netfilter, which drops it itself.
        if !bridge.is_called {
            let mut fragment = to4("10.0.0.2", UDP, &udp(53, 1000));
            fragment[20..22].copy_from_slice(&[0, 1]);
            bridge.assert_passes(&other, &guest, &fragment);
            fragment[16..18].copy_from_slice(&[0, 0]);
            bridge.assert_dropped(&other, &guest, "malformed fragment", &fragment);
        }
        // The guest sends a request, and only the reply is admitted.
        bridge.assert_passes(&guest, &other, &ask4(&udp(1000, 53)));
        bridge.assert_passes(&other, &guest, &to4("10.0.0.2", UDP, &udp(53, 1000)));
        bridge.assert_dropped(
            &other,
            &guest,
            "answer from elsewhere",
            &to4("10.0.0.3", UDP, &udp(53, 1000)),
        );
        bridge.assert_dropped(
            &other,
            &guest,
            "connection in an answer's place",
            &to4("10.0.0.2", TCP, &tcp(53, 1000, 2)),
        );
    }
}

#[test]
fn send_dhcp_offer_passes_only_to_a_dhcp_guest() {
    for bridge in bridges() {
        let roaming = bridge.guest(1, NicRules { admits: Some(Vec::new()), ..filtered(&[]) });
        let settled =
            bridge.guest(2, NicRules { admits: Some(Vec::new()), ..filtered(&["10.0.0.2"]) });
        let server = bridge.guest(3, NicRules::default());
        let offer4 = |to, port| {
            ethernet(to, mac(3), IP4, &ip4("10.0.0.3", "10.0.0.77", UDP, &udp(67, port)))
        };
        let offer6 =
            |to| ethernet(to, mac(3), IP6, &ip6("fe80::3", "fe80::ff:fe00:1", UDP, &udp(547, 546)));
        bridge.assert_passes(&server, &roaming, &offer4(mac(1), 68));
        bridge.assert_passes(&server, &roaming, &offer6(mac(1)));
        bridge.assert_dropped(&server, &roaming, "another port", &offer4(mac(1), 69));
        bridge.assert_dropped(
            &server,
            &settled,
            "a lease for a guest with fixed addresses",
            &offer4(mac(2), 68),
        );
    }
}
