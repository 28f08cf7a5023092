//! Bridges, taps and rules on a real kernel, each test in network namespaces of its own.

use std::net::UdpSocket;

use bosh_qemu_cpi::error::ErrorKind;
use bosh_qemu_cpi::net::apply;
use bosh_qemu_cpi::net::plan::{Keeper, Segment};
use serde_json::json;

use crate::support::lab::{BRIDGE, Lab, existing, name, nat, seen_from, text};
use crate::support::nftables;

const TABLE: &str = "bosh-qemu-bosh-nat0";

#[test]
fn a_bridge_is_made_once_and_marked() {
    let Some(lab) = Lab::new() else { return };
    let segment = nat("10.0.0.1");
    lab.ensure(&segment).unwrap();
    let bridge = lab.bridge();
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
        lab.host.run(|| std::fs::read_to_string(format!("/proc/sys/net/{key}")).unwrap())
    };
    assert_eq!(setting("ipv4/ip_forward"), "1\n");
    assert_eq!(setting(&format!("ipv6/conf/{BRIDGE}/accept_ra")), "0\n");
    assert_eq!(lab.host.run(nftables::tables), [TABLE]);

    let before = lab.state();
    lab.ensure(&segment).unwrap();
    assert_eq!(lab.state(), before);
}

#[test]
fn what_somebody_broke_is_made_again() {
    let Some(lab) = Lab::new() else { return };
    let segment = Segment { mtu: Some(1500), ..nat("10.0.0.1") };
    lab.ensure(&segment).unwrap();
    let (index, mac) = (lab.bridge()["ifindex"].clone(), lab.bridge()["address"].clone());
    // Without its mark it is as after a crash between making and marking it.
    lab.host.ip(&format!("link set {BRIDGE} down mtu 1400 alias ..."));
    lab.host.run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap());
    lab.host.ip(&format!("address flush dev {BRIDGE}"));
    lab.host.run(|| nftables::write_table(TABLE, false));
    lab.ensure(&segment).unwrap();
    let vm = lab.vm("port0", "10.0.0.5");
    assert_eq!(seen_from(&lab, &vm, "192.0.2.2").to_string(), "192.0.2.1");
    assert_eq!((&lab.bridge()["ifindex"], &lab.bridge()["mtu"]), (&index, &1500.into()));

    lab.host.ip(&format!("link set {BRIDGE} address 02:00:00:00:00:01 alias bosh-qemu-cpi:lab"));
    lab.ensure(&segment).unwrap();
    assert_eq!(lab.bridge()["address"], mac);
}

#[test]
fn a_tap_lives_as_long_as_its_descriptor_and_leaves_the_bridge_as_it_was() {
    let Some(lab) = Lab::new() else { return };
    let segment = Segment { mtu: Some(1400), ..nat("10.0.0.1") };
    let first = lab.plug("bqfirstn0", &segment).unwrap();
    let mac = lab.bridge()["address"].clone();
    let second = lab.plug("bqsecondn0", &segment).unwrap();
    assert_eq!((first.mtu, second.mtu), (1400, 1400));
    let tap = lab.host.link("bqfirstn0").unwrap();
    assert_eq!((&tap["master"], &tap["mtu"]), (&BRIDGE.into(), &1400.into()));
    assert!(tap["flags"].as_array().unwrap().contains(&"UP".into()));
    assert_eq!(tap["addr_info"], json!([]), "the host must not speak on a VM's wire");
    assert_eq!(tap["linkinfo"]["info_data"]["vnet_hdr"], true);

    let taken = lab.plug("bqfirstn0", &segment).unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::Conflict, "{}", text(&taken));
    lab.release(&segment).unwrap();
    assert!(lab.host.link(BRIDGE).is_some(), "a bridge with ports stays");

    let copy = [first.queues[0].try_clone().unwrap()];
    drop(first);
    assert!(lab.host.link("bqfirstn0").is_some());
    lab.unplug("bqfirstn0", copy);
    assert_eq!(lab.bridge()["address"], mac);
    lab.unplug("bqsecondn0", second.queues);
    lab.release(&segment).unwrap();
    assert_eq!(lab.links(), ["uplink"]);
}

#[test]
fn vms_reach_the_world_under_the_hosts_address() {
    let Some(lab) = Lab::new() else { return };
    lab.ensure(&nat("10.0.0.1")).unwrap();
    // A second manifest with another subnet on the same bridge takes nothing from the first.
    lab.ensure(&nat("10.0.1.1")).unwrap();
    for (port, ip) in [("port0", "10.0.0.5"), ("port1", "10.0.1.5")] {
        let vm = lab.vm(port, ip);
        assert_eq!(seen_from(&lab, &vm, "192.0.2.2").to_string(), "192.0.2.1");
    }
    lab.ensure(&nat("10.0.0.1")).unwrap();
    let vm = lab.vm("port2", "10.0.1.6");
    assert_eq!(seen_from(&lab, &vm, "192.0.2.2").to_string(), "192.0.2.1");
}

#[test]
fn ipv6_is_masqueraded_where_the_operator_forwards_it() {
    let Some(lab) = Lab::new() else { return };
    let segment = nat("fd00::1");
    let error = lab.ensure(&segment).unwrap_err();
    assert!(
        text(&error).starts_with("Host: this host does not forward IPv6\nHint: sysctl -w"),
        "{}",
        text(&error)
    );
    assert_eq!(lab.links(), ["uplink"]);
    lab.host.run(|| std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap());
    lab.ensure(&segment).unwrap();
    lab.host
        .run(|| UdpSocket::bind("[fd00::1]:0"))
        .expect("the gateway's address is there at once");
    let vm = lab.vm("port0", "fd00::5");
    assert_eq!(seen_from(&lab, &vm, "2001:db8::2").to_string(), "2001:db8::1");
    // Dual stack is two segments of one bridge.
    lab.ensure(&nat("10.0.0.1")).unwrap();
    let before = lab.state();
    lab.ensure(&segment).unwrap();
    assert_eq!(lab.state(), before);
}

#[test]
fn nothing_of_ours_is_left_after_the_last_vm() {
    let Some(lab) = Lab::new() else { return };
    lab.host.run(|| nftables::write_table("somebody", true));
    lab.host.ip("link add virbr0 type bridge");
    let (links, segment) = (lab.links(), nat("10.0.0.1"));
    lab.release(&segment).unwrap();
    lab.ensure(&segment).unwrap();
    let port = lab.plug("bqportn0", &segment).unwrap();
    lab.unplug("bqportn0", port.queues);
    lab.release(&segment).unwrap();
    assert_eq!(lab.links(), links);
    assert_eq!(lab.host.run(nftables::tables), ["somebody"]);
    // A table whose bridge has gone on another way is removed as well.
    lab.ensure(&segment).unwrap();
    lab.host.ip(&format!("link delete {BRIDGE}"));
    lab.release(&segment).unwrap();
    assert_eq!(lab.host.run(nftables::tables), ["somebody"]);
}

#[test]
fn somebody_elses_bridge_and_subnet_are_refused_untouched() {
    let Some(lab) = Lab::new() else { return };
    let segment = nat("10.0.0.1");
    lab.host.ip(&format!("link add {BRIDGE} type bridge"));
    let before = lab.state();
    for refused in [lab.ensure(&segment), lab.plug("bqtapn0", &segment).map(drop)] {
        assert_eq!(
            text(&refused.unwrap_err()),
            "Conflict: link 'bosh-nat0' exists and is not ours\n\
             Hint: name another bridge for network 'lab', or give it the profile 'bridge'"
        );
    }
    lab.release(&segment).unwrap();
    assert_eq!(lab.state(), before);
    lab.host.ip(&format!("link delete {BRIDGE}"));

    let before = lab.state();
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
        text(&lab.ensure(&wide).unwrap_err()),
        "Conflict: address 192.0.0.1/16 for bridge 'bosh-nat0' overlaps with the host's own 192.0.2.1/24\n\
         Hint: VMs of that subnet belong on a bridge with the host's link: give network 'lab' the profile 'bridge'; \
         or choose another subnet"
    );
    assert_eq!(lab.state(), before);
}

#[test]
fn an_operators_bridge_is_used_and_never_changed() {
    let Some(lab) = Lab::new() else { return };
    let segment = existing("br0");
    let refusal = |segment: &Segment| text(&lab.ensure(segment).unwrap_err());
    assert_eq!(
        refusal(&segment),
        "NetworkNotFound: bridge 'br0' does not exist\n\
         Hint: make it: ip link add br0 type bridge && ip link set br0 up"
    );
    assert_eq!(
        refusal(&existing("uplink")),
        "BadConfig: bridge 'uplink' is a link, but no bridge: its kind is veth\n\
         Hint: make a bridge and put it in: ip link add br0 type bridge && ip link set uplink master br0"
    );
    lab.host.ip("link add br0 type bridge");
    assert_eq!(
        refusal(&segment),
        "Conflict: bridge 'br0' is down\nHint: switch it on: ip link set br0 up"
    );
    lab.host.ip("link set br0 up");
    lab.host.ip("link set uplink master br0");
    // Higher than nearly every address that the kernel would draw for a tap.
    lab.host.ip("link set uplink mtu 1450 address fa:ff:ff:ff:ff:ff");
    assert_eq!(
        refusal(&Segment { mtu: Some(9000), ..segment.clone() }),
        "BadConfig: bridge 'br0' carries packets of 1450 bytes, network 'br0' wants 9000\n\
         Hint: ip link set br0 mtu 9000"
    );

    let bridge = || {
        lab.host
            .link("br0")
            .map(|link| (link["address"].clone(), link["mtu"].clone(), link["ifalias"].clone()))
    };
    let before = bridge();
    let small = Segment { mtu: Some(1300), ..segment.clone() };
    let (plain, small) =
        (lab.plug("bqplainn0", &segment).unwrap(), lab.plug("bqsmalln0", &small).unwrap());
    assert_eq!((plain.mtu, small.mtu), (1450, 1300));
    assert_eq!(bridge(), before);
    lab.unplug("bqplainn0", plain.queues);
    lab.unplug("bqsmalln0", small.queues);
    lab.release(&segment).unwrap();
    assert_eq!(bridge(), before);
    assert_eq!(lab.host.run(nftables::tables), [""; 0]);
}

#[test]
fn a_leftover_tap_can_be_removed_and_nothing_else() {
    let Some(lab) = Lab::new() else { return };
    let remove = |link: &str| lab.host.run(|| apply::remove_tap(&name(link)));
    lab.host.ip("tuntap add dev bqoldn0 mode tap");
    let taken = lab.plug("bqoldn0", &nat("10.0.0.1")).unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::Conflict, "{}", text(&taken));
    lab.release(&nat("10.0.0.1")).unwrap();
    remove("bqoldn0").unwrap();
    remove("bqoldn0").unwrap();
    assert_eq!(text(&remove("uplink").unwrap_err()), "Conflict: link 'uplink' is not a tap");
    assert_eq!(lab.links(), ["uplink"]);
}

#[test]
fn several_at_once_make_one_bridge() {
    let Some(lab) = Lab::new() else { return };
    let segment = nat("10.0.0.1");
    for round in 0..5 {
        let start = std::sync::Barrier::new(4);
        let plugs: Vec<_> = std::thread::scope(|scope| {
            let at_once = |i: usize| {
                let (lab, segment, start) = (&lab, &segment, &start);
                scope.spawn(move || {
                    start.wait();
                    lab.plug(&format!("bqtap{i}n0"), segment)
                })
            };
            let threads: Vec<_> = (0..4).map(at_once).collect();
            threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect()
        });
        assert_eq!(
            lab.bridge()["addr_info"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|a| a["family"] == "inet")
                .count(),
            1
        );
        assert_eq!(lab.links().len(), 2 + plugs.len(), "round {round}");
        for (i, plug) in plugs.into_iter().enumerate() {
            lab.unplug(&format!("bqtap{i}n0"), plug.queues);
        }
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..2).map(|_| scope.spawn(|| lab.release(&segment))).collect();
            assert!(threads.into_iter().all(|thread| thread.join().unwrap().unwrap()));
        });
        assert_eq!(lab.links(), ["uplink"]);
    }
}
