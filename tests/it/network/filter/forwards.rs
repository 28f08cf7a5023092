//! Forwarded ports of the host.

use std::net::{TcpListener, TcpStream};

use bosh_qemu_cpi::net::filter;
use bosh_qemu_cpi::store::nic_rules::{Forward, NicRules};

use super::{BRIDGE, FRAME_TIMEOUT, TCP, filtered, nic, no_others};
use crate::support::netns::Namespace;

#[test]
fn connect_to_forwarded_port_reaches_the_guest() {
    for (gateway, inside, at_host, outer) in [
        ("10.0.0.254/24", "10.0.0.1/24", "192.0.2.1/24", "192.0.2.2/24"),
        ("fd00::fe/64", "fd00::1/64", "2001:db8::1/64", "2001:db8::2/64"),
    ] {
        let (Some(host), Some(guest), Some(outside)) =
            (Namespace::new(), Namespace::new(), Namespace::new())
        else {
            return;
        };
        let v6 = gateway.contains(':');
        let nodad = if v6 { "nodad" } else { "" };
        host.ip(&format!("link add {BRIDGE} type bridge"));
        host.ip(&format!("link set {BRIDGE} up"));
        host.ip(&format!("address add {gateway} dev {BRIDGE} {nodad}"));
        let forwarding = if v6 { "ipv6/conf/all/forwarding" } else { "ipv4/ip_forward" };
        host.run(|| std::fs::write(format!("/proc/sys/net/{forwarding}"), "1").unwrap());
        host.cable("bqport1", &guest, "eth0");
        guest.ip("link set eth0 address 02:00:00:00:00:01");
        host.cable("uplink", &outside, "eth0");
        let address = |text: &str| text.split_once('/').unwrap().0.to_owned();
        let to: std::net::IpAddr = address(inside).parse().unwrap();
        let forward =
            |host, address| Forward { address, protocol: TCP, host, to, guest: 80, count: 1 };
        let named = address(at_host).parse().unwrap();
        let elsewhere: std::net::IpAddr = address(outer).parse().unwrap();
        let rules = NicRules {
            forwards: vec![
                forward(8080, None),
                forward(8081, Some(named)),
                forward(8082, Some(elsewhere)),
            ],
            ..filtered(&[&address(inside)])
        };
        let vm = nic("bqport1", 1, rules);
        host.run(|| filter::add(std::slice::from_ref(&vm), no_others)).unwrap();
        host.ip(&format!("link set bqport1 master {BRIDGE}"));
        guest.ip(&format!("address add {inside} dev eth0 {nodad}"));
        guest.ip(&format!("route add default via {}", address(gateway)));
        host.ip(&format!("address add {at_host} dev uplink {nodad}"));
        outside.ip(&format!("address add {outer} dev eth0 {nodad}"));

        let listener = guest.run(|| TcpListener::bind((to, 80)).unwrap());
        let connects = |from: &Namespace, port| {
            from.run(|| TcpStream::connect_timeout(&(named, port).into(), FRAME_TIMEOUT))
        };
        for (from, port) in [(&outside, 8080), (&outside, 8081), (&host, 8080), (&host, 8081)] {
            let stream =
                connects(from, port).unwrap_or_else(|error| panic!("{named}:{port}: {error}"));
            let (served, peer) = listener.accept().unwrap();
            assert_eq!(peer.port(), stream.local_addr().unwrap().port());
            drop(served);
        }
        let others = outside.run(|| TcpListener::bind((elsewhere, 8082)).unwrap());
        host.run(|| TcpStream::connect_timeout(&(elsewhere, 8082).into(), FRAME_TIMEOUT)).unwrap();
        others.set_nonblocking(true).unwrap();
        others.accept().expect("an address of another machine is not forwarded");
        host.run(|| filter::remove(std::slice::from_ref(&vm))).unwrap();
        assert!(connects(&outside, 8080).is_err(), "the forward is removed with its VM");
    }
}
