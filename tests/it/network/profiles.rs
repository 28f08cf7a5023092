//! Reachability under each profile, and repair. Machines are namespaces, the kernel is real.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use bosh_qemu_cpi::net::apply;
use bosh_qemu_cpi::net::plan::Segment;
use serde_json::json;

use crate::support::topology::{BRIDGE, Topology, name, nat, reaches, seen_from, segment};
use crate::support::{nftables, skip};

#[test]
fn connect_from_routed_vm_keeps_its_address() {
    let Some(topology) = Topology::new() else { return };
    let segment = segment(&json!({"profile": "routed", "bridge": BRIDGE}), "10.0.0.1");
    topology.ensure(&segment).unwrap();
    let vm = topology.vm("port0", "10.0.0.5");
    // The only route that the router of the LAN needs.
    topology.outside.ip("route add 10.0.0.0/24 via 192.0.2.1");
    assert_eq!(seen_from(&topology, &vm, "192.0.2.2").to_string(), "10.0.0.5");
    assert!(reaches(&topology.outside, &vm, "10.0.0.5"), "the way in is open as well");
    assert_eq!(
        topology.host.run(nftables::tables),
        ["bosh-qemu-bosh-nat0"],
        "what VMs may say to the host"
    );
}

#[test]
fn connect_to_metadata_service_from_vm_is_dropped() {
    let Some(topology) = Topology::new() else { return };
    topology.host.run(|| std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap());
    for (gateway, port, ip, services, world) in [
        (
            "10.0.0.1",
            "port0",
            "10.0.0.5",
            &["169.254.169.254", "168.63.129.16", "100.100.100.200"][..],
            "192.0.2.2",
        ),
        ("fd00::1", "port1", "fd00::5", &["fd00:ec2::254", "fd20:ce::254"], "2001:db8::2"),
    ] {
        topology.ensure(&nat(gateway)).unwrap();
        let vm = topology.vm(port, ip);
        for service in services {
            let length = if service.contains(':') { "128 nodad" } else { "32" };
            topology.outside.ip(&format!("address add {service}/{length} dev world"));
            topology.host.ip(&format!("route add {service} dev uplink"));
            assert!(reaches(&topology.host, &topology.outside, service), "the host itself");
            assert!(!reaches(&vm, &topology.outside, service), "{service} as the host");
        }
        assert!(reaches(&vm, &topology.outside, world), "the world");
    }
}

#[test]
fn connect_from_isolated_vm_reaches_only_the_host() {
    let Some(topology) = Topology::new() else { return };
    let isolated =
        segment(&json!({"profile": "isolated", "host_services": ["tcp/2222"]}), "10.0.0.1");
    let one = topology.unplugged_vm("port0", "10.0.0.5");
    let two = topology.unplugged_vm("port1", "10.0.0.6");
    topology.outside.ip("route add 10.0.0.0/24 via 192.0.2.1");
    let ports = [name("port0").into(), name("port1").into()];
    topology.host.run(|| apply::ensure(&isolated, &ports)).unwrap();
    // Another network makes the host forward packets.
    topology.ensure(&nat("10.1.0.1")).unwrap();
    assert!(reaches(&topology.host, &one, "10.0.0.5"), "from the host, and the answer back");
    for (port, open) in [(2222, true), (2223, false)] {
        let at = SocketAddr::from(([10, 0, 0, 1], port));
        let _listener = topology.host.run(|| TcpListener::bind(at).unwrap());
        let connected = one.run(|| TcpStream::connect_timeout(&at, Duration::from_millis(500)));
        assert_eq!(connected.is_ok(), open, "port {port} of the host");
    }
    assert!(!reaches(&one, &two, "10.0.0.6"), "a neighbour");
    assert!(!reaches(&one, &topology.outside, "192.0.2.2"), "the world");
    assert!(!reaches(&topology.outside, &one, "10.0.0.5"), "from the world");
    for (vm, neighbour) in [(&one, "10.0.0.6"), (&two, "10.0.0.5")] {
        vm.ip(&format!("route add {neighbour}/32 via 10.0.0.1"));
    }
    assert!(!reaches(&one, &two, "10.0.0.6"), "a neighbour by way of the gateway");

    let before = topology.state();
    topology.host.run(|| apply::ensure(&isolated, &ports)).unwrap();
    assert_eq!(topology.state(), before);
}

#[test]
fn connect_to_neighbour_on_closed_network_succeeds() {
    let Some(topology) = Topology::new() else { return };
    let closed =
        Segment { isolated: false, ..segment(&json!({"profile": "isolated"}), "10.0.0.1") };
    let one = topology.unplugged_vm("port0", "10.0.0.5");
    let two = topology.unplugged_vm("port1", "10.0.0.6");
    topology
        .host
        .run(|| apply::ensure(&closed, &[name("port0").into(), name("port1").into()]))
        .unwrap();
    topology.ensure(&nat("10.1.0.1")).unwrap();
    assert!(reaches(&one, &two, "10.0.0.6"), "a neighbour");
    assert!(!reaches(&one, &topology.outside, "192.0.2.2"), "the world");
}

#[test]
fn ensure_after_removal_restores_bridge_with_its_taps() {
    let Some(topology) = Topology::new() else { return };
    let (segment, ports) = (nat("10.0.0.1"), [name("port0").into(), name("not-there").into()]);
    let vm = topology.unplugged_vm("port0", "10.0.0.5");
    let heal = || {
        topology.host.run(|| apply::ensure(&segment, &ports)).unwrap();
        assert_eq!(seen_from(&topology, &vm, "192.0.2.2").to_string(), "192.0.2.1");
        let left: Vec<_> = topology.host.run(|| apply::missing_changes(&segment, &ports)).unwrap();
        assert!(left.is_empty(), "{left:?}");
    };
    heal();
    for harm in [
        "link delete bosh-nat0",
        "link set port0 nomaster",
        "route flush dev bosh-nat0",
        "address flush dev bosh-nat0",
    ] {
        topology.host.ip(harm);
        heal();
    }
    topology.host.run(nftables::flush);
    heal();
}

#[test]
fn ensure_bridge_takes_the_mtu_of_the_default_route() {
    let Some(topology) = Topology::new() else { return };
    topology.host.ip("link set uplink mtu 1400");
    topology.ensure(&nat("10.0.0.1")).unwrap();
    assert_eq!(
        topology.bridge()["mtu"],
        1500,
        "without a default route there is no way to the world"
    );
    topology.release(&nat("10.0.0.1")).unwrap();
    topology.host.ip("route add default via 192.0.2.2");
    let plug = topology.plug("bqwiden0", &nat("10.0.0.1")).unwrap();
    assert_eq!((plug.mtu, &topology.bridge()["mtu"]), (1400, &1400.into()));
    let configured = Segment { mtu: Some(1300), ..nat("10.1.0.1") };
    assert_eq!(topology.plug("bqnarrown0", &configured).unwrap().mtu, 1300);
}

#[test]
fn plug_tap_opens_a_queue_for_each_cpu() {
    let Some(topology) = Topology::new() else { return };
    let segment = nat("10.0.0.1");
    let plug = |queues| {
        topology
            .host
            .run(|| {
                apply::plug(&name("bqmanyn0").into(), &segment, queues, || {
                    Ok((segment.clone(), Vec::new()))
                })
            })
            .unwrap()
    };
    let many = plug(4);
    assert_eq!(many.queues.len(), 4);
    assert_eq!(
        topology.host.link("bqmanyn0").unwrap()["linkinfo"]["info_data"]["multi_queue"],
        true
    );
    if std::path::Path::new("/dev/vhost-net").exists() {
        assert_eq!(many.vhost.len(), 4);
    } else {
        skip("no /dev/vhost-net: only that a tap does without");
        assert_eq!(many.vhost.len(), 0);
    }
    let mut queues = many.queues;
    let last = queues.split_off(3);
    drop(queues);
    assert!(topology.host.link("bqmanyn0").is_some(), "each queue keeps the tap");
    topology.unplug("bqmanyn0", last);
    topology.unplug("bqmanyn0", plug(1).queues);
}
