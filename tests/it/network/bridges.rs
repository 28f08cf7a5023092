//! Bridges, taps and rules on a real kernel, each test in network namespaces of its own.

use std::net::UdpSocket;

use bosh_qemu_cpi::error::ErrorKind;
use bosh_qemu_cpi::net::apply;
use bosh_qemu_cpi::net::plan::{Keeper, Segment};
use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};
use serde_json::json;

use crate::support::nftables;
use crate::support::topology::{BRIDGE, Topology, existing, name, nat, seen_from, text};

const TABLE: &str = "bosh-qemu-bosh-nat0";

#[test]
fn ensure_bridge_twice_makes_it_once() {
    let Some(topology) = Topology::new() else { return };
    let segment = nat("10.0.0.1");
    topology.ensure(&segment).unwrap();
    let bridge = topology.bridge();
    assert_eq!(bridge["ifalias"], "bosh-qemu-cpi:lab");
    assert_eq!(bridge["mtu"], 1500);
    assert_eq!(bridge["linkinfo"]["info_kind"], "bridge");
    assert_eq!(bridge["linkinfo"]["info_data"]["stp_state"], 0);
    assert_eq!(bridge["linkinfo"]["info_data"]["forward_delay"], 0);
    assert_eq!(
        (&bridge["addr_info"][0]["local"], &bridge["addr_info"][0]["prefixlen"]),
        (&"10.0.0.1".into(), &24.into())
    );
    assert!(bridge["flags"].as_array().unwrap().contains(&"UP".into()));
    let setting = |key: &str| {
        topology.host.run(|| std::fs::read_to_string(format!("/proc/sys/net/{key}")).unwrap())
    };
    assert_eq!(setting("ipv4/ip_forward"), "1\n");
    assert_eq!(setting(&format!("ipv6/conf/{BRIDGE}/accept_ra")), "0\n");
    assert_eq!(topology.host.run(nftables::tables), [TABLE]);

    let before = topology.state();
    topology.ensure(&segment).unwrap();
    assert_eq!(topology.state(), before);
}

#[test]
fn ensure_damaged_bridge_repairs_it() {
    let Some(topology) = Topology::new() else { return };
    let segment = Segment { mtu: Some(1500), ..nat("10.0.0.1") };
    topology.ensure(&segment).unwrap();
    let (index, mac) = (topology.bridge()["ifindex"].clone(), topology.bridge()["address"].clone());
    // Without its alias it is as after a crash between its creation and its marking.
    topology.host.ip(&format!("link set {BRIDGE} down mtu 1400 alias ..."));
    topology.host.run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap());
    topology.host.ip(&format!("address flush dev {BRIDGE}"));
    topology.host.run(|| nftables::write_table(TABLE, false));
    topology.ensure(&segment).unwrap();
    let vm = topology.vm("port0", "10.0.0.5");
    assert_eq!(seen_from(&topology, &vm, "192.0.2.2").to_string(), "192.0.2.1");
    assert_eq!((&topology.bridge()["ifindex"], &topology.bridge()["mtu"]), (&index, &1500.into()));

    topology
        .host
        .ip(&format!("link set {BRIDGE} address 02:00:00:00:00:01 alias bosh-qemu-cpi:lab"));
    topology.ensure(&segment).unwrap();
    assert_eq!(topology.bridge()["address"], mac);
}

/// As in a container: `/proc/sys` is read-only.
#[test]
fn plug_with_read_only_settings_demands_only_what_the_network_needs() {
    let Some(topology) = Topology::new() else { return };
    let set = |key: &str, value: &str| {
        topology.host.run(|| std::fs::write(format!("/proc/sys/net/{key}"), value).unwrap());
    };
    let plug = |gateway: &str| {
        let segment = nat(gateway);
        topology.host.run(|| {
            make_settings_read_only();
            let all = || Ok((segment.clone(), Vec::new()));
            apply::plug(&name("bqtapn0").into(), &segment, 1, all)
        })
    };
    // New namespaces have the settings of the first one.
    set("ipv4/ip_forward", "0");
    let refused = plug("10.0.0.1").unwrap_err();
    assert!(text(&refused).contains("sysctl -w net.ipv4.ip_forward=1"), "{}", text(&refused));
    set("ipv4/ip_forward", "1");
    let plugged = plug("10.0.0.1").unwrap();
    assert_eq!(topology.host.link("bqtapn0").unwrap()["master"], BRIDGE);
    topology.unplug("bqtapn0", plugged.queues);
    topology.release(&nat("10.0.0.1")).unwrap();

    set("ipv6/conf/all/forwarding", "1");
    set("ipv6/conf/default/disable_ipv6", "0");
    topology.unplug("bqtapn0", plug("fd00::1").unwrap().queues);
    topology.release(&nat("fd00::1")).unwrap();
    set("ipv6/conf/default/disable_ipv6", "1");
    let refused = text(&plug("fd00::1").unwrap_err());
    assert!(refused.contains("sysctl -w net.ipv6.conf.default.disable_ipv6=0"), "{refused}");
}

/// Makes `/proc/sys` read-only for this thread.
fn make_settings_read_only() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let mount = |from: Option<&str>, to: &str, flags| {
        nix::mount::mount(from, to, None::<&str>, flags, None::<&str>).unwrap();
    };
    mount(None, "/", MsFlags::MS_REC | MsFlags::MS_PRIVATE);
    mount(Some("/proc/sys"), "/proc/sys", MsFlags::MS_BIND);
    mount(None, "/proc/sys", MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY);
}

#[test]
fn close_tap_descriptor_removes_the_tap() {
    let Some(topology) = Topology::new() else { return };
    let segment = Segment { mtu: Some(1400), ..nat("10.0.0.1") };
    let first = topology.plug("bqfirstn0", &segment).unwrap();
    let mac = topology.bridge()["address"].clone();
    let second = topology.plug("bqsecondn0", &segment).unwrap();
    assert_eq!((first.mtu, second.mtu), (1400, 1400));
    let tap = topology.host.link("bqfirstn0").unwrap();
    assert_eq!((&tap["master"], &tap["mtu"]), (&BRIDGE.into(), &1400.into()));
    assert!(tap["flags"].as_array().unwrap().contains(&"UP".into()));
    assert_eq!(tap["addr_info"], json!([]), "the host must not speak on a VM's wire");
    assert_eq!(tap["linkinfo"]["info_data"]["vnet_hdr"], true);

    let taken = topology.plug("bqfirstn0", &segment).unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::Conflict, "{}", text(&taken));
    topology.release(&segment).unwrap();
    assert!(topology.host.link(BRIDGE).is_some(), "a bridge with ports stays");

    let copy = [first.queues[0].try_clone().unwrap()];
    drop(first);
    assert!(topology.host.link("bqfirstn0").is_some());
    topology.unplug("bqfirstn0", copy);
    assert_eq!(topology.bridge()["address"], mac);
    topology.unplug("bqsecondn0", second.queues);
    topology.release(&segment).unwrap();
    assert_eq!(topology.links(), ["uplink"]);
}

#[test]
fn connect_from_nat_network_is_masqueraded() {
    let Some(topology) = Topology::new() else { return };
    topology.ensure(&nat("10.0.0.1")).unwrap();
    // Another subnet on the same bridge does not affect the first.
    topology.ensure(&nat("10.0.1.1")).unwrap();
    for (port, ip) in [("port0", "10.0.0.5"), ("port1", "10.0.1.5")] {
        let vm = topology.vm(port, ip);
        assert_eq!(seen_from(&topology, &vm, "192.0.2.2").to_string(), "192.0.2.1");
    }
    topology.ensure(&nat("10.0.0.1")).unwrap();
    let vm = topology.vm("port2", "10.0.1.6");
    assert_eq!(seen_from(&topology, &vm, "192.0.2.2").to_string(), "192.0.2.1");
}

#[test]
fn ensure_ipv6_network_without_forwarding_is_refused() {
    let Some(topology) = Topology::new() else { return };
    let segment = nat("fd00::1");
    let error = topology.ensure(&segment).unwrap_err();
    assert!(
        text(&error).starts_with("Host: this host does not forward IPv6\nHint: set accept_ra=2"),
        "{}",
        text(&error)
    );
    assert_eq!(topology.links(), ["uplink"]);
    topology.host.run(|| std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap());
    topology.ensure(&segment).unwrap();
    topology
        .host
        .run(|| UdpSocket::bind("[fd00::1]:0"))
        .expect("the gateway's address is there at once");
    let vm = topology.vm("port0", "fd00::5");
    assert_eq!(seen_from(&topology, &vm, "2001:db8::2").to_string(), "2001:db8::1");
    // A dual-stack network is two segments of one bridge.
    topology.ensure(&nat("10.0.0.1")).unwrap();
    let before = topology.state();
    topology.ensure(&segment).unwrap();
    assert_eq!(topology.state(), before);
}

#[test]
fn release_after_last_tap_removes_bridge_and_table() {
    let Some(topology) = Topology::new() else { return };
    topology.host.run(|| nftables::write_table("foreign", true));
    topology.host.ip("link add virbr0 type bridge");
    let (links, segment) = (topology.links(), nat("10.0.0.1"));
    topology.release(&segment).unwrap();
    topology.ensure(&segment).unwrap();
    let port = topology.plug("bqportn0", &segment).unwrap();
    topology.unplug("bqportn0", port.queues);
    topology.release(&segment).unwrap();
    assert_eq!(topology.links(), links);
    assert_eq!(topology.host.run(nftables::tables), ["foreign"]);
    // The table is removed even if another program has removed the bridge.
    topology.ensure(&segment).unwrap();
    topology.host.ip(&format!("link delete {BRIDGE}"));
    topology.release(&segment).unwrap();
    assert_eq!(topology.host.run(nftables::tables), ["foreign"]);
}

#[test]
fn ensure_foreign_bridge_or_subnet_is_refused() {
    let Some(topology) = Topology::new() else { return };
    let segment = nat("10.0.0.1");
    topology.host.ip(&format!("link add {BRIDGE} type bridge"));
    let before = topology.state();
    for refused in [topology.ensure(&segment), topology.plug("bqtapn0", &segment).map(drop)] {
        assert_eq!(
            text(&refused.unwrap_err()),
            "Conflict: link 'bosh-nat0' exists, and the CPI did not make it\n\
             Hint: name another bridge for network 'lab', or give it the profile 'bridge'"
        );
    }
    topology.release(&segment).unwrap();
    assert_eq!(topology.state(), before);
    topology.host.ip(&format!("link delete {BRIDGE}"));

    let before = topology.state();
    let wide = Segment {
        keeper: Keeper::Cpi {
            addresses: vec!["192.0.0.1/16".parse().unwrap()],
            masquerade: true,
            services: None,
            closed: false,
            uplink: None,
        },
        ..segment
    };
    assert_eq!(
        text(&topology.ensure(&wide).unwrap_err()),
        "Conflict: address 192.0.0.1/16 for bridge 'bosh-nat0' overlaps with the host's address \
         192.0.2.1/24\n\
         Hint: choose another subnet; or, for VMs in the host's own subnet, put the host's link \
         into a bridge and give network 'lab' the profile 'bridge'"
    );
    assert_eq!(topology.state(), before);
}

#[test]
fn plug_into_operator_bridge_does_not_change_it() {
    let Some(topology) = Topology::new() else { return };
    let segment = existing("br0");
    let refusal = |segment: &Segment| text(&topology.ensure(segment).unwrap_err());
    assert_eq!(
        refusal(&segment),
        "NetworkNotFound: bridge 'br0' does not exist\n\
         Hint: make it: ip link add br0 type bridge && ip link set br0 up"
    );
    assert_eq!(
        refusal(&existing("uplink")),
        "BadConfig: bridge 'uplink' is no bridge but a link of kind 'veth'\n\
         Hint: name a bridge that has it as a port: ip link add br0 type bridge && \
         ip link set uplink master br0"
    );
    topology.host.ip("link add br0 type bridge");
    assert_eq!(
        refusal(&segment),
        "Conflict: bridge 'br0' is down\nHint: switch it on: ip link set br0 up"
    );
    topology.host.ip("link set br0 up");
    topology.host.ip("link set uplink master br0");
    // Higher than nearly every MAC that the kernel draws for a tap.
    topology.host.ip("link set uplink mtu 1450 address fa:ff:ff:ff:ff:ff");
    assert_eq!(
        refusal(&Segment { mtu: Some(9000), ..segment.clone() }),
        "BadConfig: bridge 'br0' has an MTU of 1450 bytes, but network 'br0' has mtu 9000\n\
         Hint: ip link set br0 mtu 9000"
    );

    let bridge = || {
        topology
            .host
            .link("br0")
            .map(|link| (link["address"].clone(), link["mtu"].clone(), link["ifalias"].clone()))
    };
    let before = bridge();
    let small = Segment { mtu: Some(1300), ..segment.clone() };
    let (plain, small) = (
        topology.plug("bqplainn0", &segment).unwrap(),
        topology.plug("bqsmalln0", &small).unwrap(),
    );
    assert_eq!((plain.mtu, small.mtu), (1450, 1300));
    assert_eq!(bridge(), before);
    topology.unplug("bqplainn0", plain.queues);
    topology.unplug("bqsmalln0", small.queues);
    topology.release(&segment).unwrap();
    assert_eq!(bridge(), before);
    assert_eq!(topology.host.run(nftables::tables), [""; 0]);
}

#[test]
fn remove_tap_removes_no_other_link() {
    let Some(topology) = Topology::new() else { return };
    let remove = |link: &str| topology.host.run(|| apply::remove_tap(&name(link)));
    topology.host.ip("tuntap add dev bqoldn0 mode tap");
    let taken = topology.plug("bqoldn0", &nat("10.0.0.1")).unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::Conflict, "{}", text(&taken));
    topology.release(&nat("10.0.0.1")).unwrap();
    remove("bqoldn0").unwrap();
    remove("bqoldn0").unwrap();
    assert_eq!(text(&remove("uplink").unwrap_err()), "Conflict: link 'uplink' is not a tap");
    assert_eq!(topology.links(), ["uplink"]);
}

#[test]
fn plug_concurrently_makes_one_bridge() {
    let Some(topology) = Topology::new() else { return };
    let segment = nat("10.0.0.1");
    for round in 0..5 {
        let start = std::sync::Barrier::new(4);
        let plugs: Vec<_> = std::thread::scope(|scope| {
            let at_once = |i: usize| {
                let (topology, segment, start) = (&topology, &segment, &start);
                scope.spawn(move || {
                    start.wait();
                    topology.plug(&format!("bqtap{i}n0"), segment)
                })
            };
            let threads: Vec<_> = (0..4).map(at_once).collect();
            threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect()
        });
        assert_eq!(
            topology.bridge()["addr_info"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|a| a["family"] == "inet")
                .count(),
            1
        );
        assert_eq!(topology.links().len(), 2 + plugs.len(), "round {round}");
        for (i, plug) in plugs.into_iter().enumerate() {
            topology.unplug(&format!("bqtap{i}n0"), plug.queues);
        }
        std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..2).map(|_| scope.spawn(|| topology.release(&segment))).collect();
            assert!(threads.into_iter().all(|thread| thread.join().unwrap().unwrap()));
        });
        assert_eq!(topology.links(), ["uplink"]);
    }
}
