//! Security groups and source NAT: they match the source before the host's address replaced it.

use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

use bosh_qemu_cpi::net::{apply, filter};
use bosh_qemu_cpi::store::nic_rules::{Forward, NicRules};
use bosh_qemu_cpi::store::record::{Nic, Segment, Wire};
use serde_json::json;

use super::{TCP, UDP, admits, no_others, set_calls};
use crate::support::netns::Namespace;
use crate::support::nftables;
use crate::support::topology::{Topology, connects, name, nat, reaches, segment};

/// The NIC of a VM with these rules and the tap `port`.
fn nic(port: &str, segment: &Segment, ip: &str, rules: NicRules) -> Nic {
    let wire = Wire::Tap { tap: name(port), segment: segment.clone() };
    let rules = NicRules { anti_spoof: false, addresses: vec![ip.parse().unwrap()], ..rules };
    Nic { network: "lab".into(), mac: [2, 0, 0, 0, 0, 5].into(), wire, rules: Some(rules) }
}

/// Adds the NIC's rules and puts its port on the bridge.
fn plug(topology: &Topology, nic: &Nic) {
    let (tap, segment) = nic.tap().unwrap();
    topology.host.run(|| filter::add(std::slice::from_ref(nic), no_others)).unwrap();
    topology.host.run(|| apply::ensure(segment, &[tap.clone().into()])).unwrap();
}

fn remove(topology: &Topology, nic: &Nic) {
    topology.host.run(|| filter::remove(std::slice::from_ref(nic))).unwrap();
}

#[test]
fn connect_through_masquerade_is_matched_by_its_original_source() {
    for called in [false, true] {
        let Some(topology) = Topology::new().filter(|it| set_calls(&it.host, called)) else {
            return;
        };
        topology.ensure(&nat("10.0.0.1")).unwrap();
        let stranger = topology.vm("port0", "10.0.0.5");
        let routed = segment(&json!({"profile": "routed"}), "10.1.0.1");
        let grouped = topology.unplugged_vm("port1", "10.1.0.5");
        let neighbour = topology.unplugged_vm("port2", "10.1.0.6");
        topology.host.run(|| apply::ensure(&routed, &[name("port2").into()])).unwrap();
        let all = Some((0, u16::MAX));
        for (admitted, by_the_neighbour, by_the_stranger) in [
            (vec![], false, false),
            (vec![("10.1.0.0/24", TCP, all)], true, false),
            (vec![("10.0.0.5/32", TCP, all)], false, true),
        ] {
            let nic = nic("port1", &routed, "10.1.0.5", admits(&admitted));
            plug(&topology, &nic);
            assert!(reaches(&topology.host, &grouped, "10.1.0.5"), "{admitted:?}: the host itself");
            assert_eq!(
                reaches(&neighbour, &grouped, "10.1.0.5"),
                by_the_neighbour,
                "{admitted:?}: a neighbour"
            );
            assert_eq!(
                reaches(&stranger, &grouped, "10.1.0.5"),
                by_the_stranger,
                "{admitted:?}: behind the host's address"
            );
            // Replies to the VM's own requests are admitted.
            assert!(reaches(&grouped, &stranger, "10.0.0.5"), "{admitted:?}: an answer");
            remove(&topology, &nic);
        }
        assert!(reaches(&stranger, &grouped, "10.1.0.5"), "a VM without groups is open");
    }
}

#[test]
fn connect_through_host_port_is_matched_by_its_original_source() {
    for (gateway, one, two, server) in [
        ("10.0.0.1", "10.0.0.5", "10.0.0.6", "10.0.0.7"),
        ("fd00::1", "fd00::5", "fd00::6", "fd00::7"),
    ] {
        let Some(topology) = Topology::new() else { return };
        topology
            .host
            .run(|| std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap());
        let nat = nat(gateway);
        topology.ensure(&nat).unwrap();
        let (admitted, refused) = (topology.vm("port0", one), topology.vm("port1", two));
        let grouped = topology.unplugged_vm("port2", server);
        let to: IpAddr = server.parse().unwrap();
        let forward =
            |protocol, host| Forward { address: None, protocol, host, to, guest: 80, count: 1 };
        let only = if to.is_ipv4() { "10.0.0.5/32" } else { "fd00::5/128" };
        let rules = NicRules {
            forwards: vec![forward(TCP, 8080), forward(UDP, 8080)],
            ..admits(&[(only, TCP, Some((80, 80))), (only, UDP, Some((80, 80)))])
        };
        plug(&topology, &nic("port2", &nat, server, rules));

        let listener = grouped.run(|| TcpListener::bind((to, 80)).unwrap());
        let by_the_host = SocketAddr::new(gateway.parse().unwrap(), 8080);
        assert!(connects(&admitted, by_the_host), "{one}");
        // The kernel replaces the source by the host's address. Otherwise the reply would not come
        // from the requested address.
        assert_eq!(listener.accept().unwrap().1.ip(), by_the_host.ip());
        assert!(!connects(&refused, by_the_host), "{two}");

        let socket = grouped.run(|| UdpSocket::bind((to, 80)).unwrap());
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let asks = |from: &Namespace, word: &[u8]| {
            let asker = from
                .run(|| UdpSocket::bind((if to.is_ipv4() { "0.0.0.0" } else { "::" }, 0)).unwrap());
            asker.send_to(word, by_the_host).unwrap();
            asker
        };
        let _refused = asks(&refused, b"no");
        let asker = asks(&admitted, b"one");
        let mut word = [0; 8];
        let (length, peer) = socket.recv_from(&mut word).unwrap();
        assert_eq!(&word[..length], b"one");
        socket.send_to(b"answer", peer).unwrap();
        asker.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert_eq!(asker.recv_from(&mut word).unwrap(), (6, by_the_host));
        // Later packets of the connection are matched, too.
        asker.send_to(b"two", by_the_host).unwrap();
        let (length, _) = socket.recv_from(&mut word).unwrap();
        assert_eq!(&word[..length], b"two");
        assert!(
            topology.host.run(|| nftables::drops("bosh-qemu-guard")) > 0,
            "refused packets are counted"
        );
    }
}
