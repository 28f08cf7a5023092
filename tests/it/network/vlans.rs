//! VLANs on a real kernel, if it has them: of an uplink, and of a VLAN-aware bridge. `./test` also
//! runs this in a guest whose kernel has both.

use std::net::{SocketAddr, TcpListener};
use std::process::Command;

use bosh_qemu_cpi::net::change::Port;
use bosh_qemu_cpi::net::plan::Segment;
use bosh_qemu_cpi::net::{apply, filter};
use bosh_qemu_cpi::store::nic_rules::{Admission, NicRules};
use bosh_qemu_cpi::store::record::{Nic, Wire};
use serde_json::{Value, json};

use crate::support::netns::Namespace;
use crate::support::skip;
use crate::support::topology::{Topology, connects, existing, name, reaches, segment, text};

const MAC: &str = "02:00:00:00:00:05";

/// Whether `ip` succeeds with these words, which depends on the kernel.
fn can(host: &Namespace, words: &str) -> bool {
    host.run(|| {
        Command::new("ip").args(words.split_whitespace()).output().unwrap().status.success()
    })
}

/// Output of `bridge -json`.
fn bridge(host: &Namespace, words: &str) -> Value {
    let output = host.run(|| {
        Command::new("bridge").arg("-json").args(words.split_whitespace()).output().unwrap()
    });
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("bridge {words}: {output:?}"))
}

/// Adds addresses on VLANs to the outside. It answers ARP for each address on its own VLAN alone.
fn outside_on(topology: &Topology, addresses: &[(u16, &str)]) {
    topology.outside.run(|| std::fs::write("/proc/sys/net/ipv4/conf/all/arp_ignore", "1").unwrap());
    for (vlan, address) in addresses {
        if topology.outside.link(&format!("world.{vlan}")).is_none() {
            topology.outside.ip(&format!("link add world.{vlan} link world type vlan id {vlan}"));
            topology.outside.ip(&format!("link set world.{vlan} up"));
        }
        topology.outside.ip(&format!("address add {address}/24 dev world.{vlan}"));
    }
}

/// The NIC of the VM 10.0.0.5. Its security group admits TCP from 10.0.0.2.
fn nic(port: &str, segment: &Segment) -> Nic {
    let rules = NicRules {
        anti_spoof: true,
        addresses: vec!["10.0.0.5/32".parse().unwrap()],
        admits: Some(vec![Admission {
            source: "10.0.0.2/32".parse().unwrap(),
            protocols: (6, 6),
            ports: Some((1, u16::MAX)),
        }]),
        ..NicRules::default()
    };
    let wire = Wire::Tap { tap: name(port), segment: segment.clone() };
    Nic { network: "lab".into(), mac: MAC.parse().unwrap(), wire, rules: Some(rules) }
}

/// Adds the rules of `nic` and puts its port, the end of a veth pair, on the bridge.
fn plug(topology: &Topology, nic: &Nic) {
    let (port, segment) = Port::of(nic).unwrap();
    topology.host.run(|| filter::add(std::slice::from_ref(nic), || Ok(Vec::new()))).unwrap();
    topology.host.run(|| apply::ensure(segment, std::slice::from_ref(&port))).unwrap();
    let left = topology.host.run(|| apply::missing_changes(segment, &[port])).unwrap();
    assert!(left.is_empty(), "{left:?}");
}

/// Asserts that a VM on VLAN 20 reaches only this VLAN and that its packets are filtered.
fn assert_confined_to_its_vlan(topology: &Topology, vm: &Namespace) {
    outside_on(topology, &[(20, "10.0.0.2"), (20, "10.0.0.4"), (30, "10.0.0.3")]);
    assert!(reaches(vm, &topology.outside, "10.0.0.2"), "its VLAN");
    assert!(!reaches(vm, &topology.outside, "10.0.0.3"), "another VLAN");
    let listener = vm.run(|| TcpListener::bind("10.0.0.5:0").unwrap());
    let to = listener.local_addr().unwrap();
    for (from, admitted) in [("10.0.0.2", true), ("10.0.0.4", false)] {
        topology.outside.ip(&format!("route replace 10.0.0.5/32 dev world.20 src {from}"));
        assert_eq!(connects(&topology.outside, to), admitted, "from {from}");
    }
    vm.ip("address add 10.0.0.77/24 dev eth0");
    vm.ip("route replace 10.0.0.2/32 dev eth0 src 10.0.0.77");
    assert!(!reaches(vm, &topology.outside, "10.0.0.2"), "under another's address");
}

fn machine(topology: &Topology, port: &str) -> Namespace {
    let vm = topology.unplugged_vm(port, "10.0.0.5");
    vm.ip(&format!("link set eth0 address {MAC}"));
    vm
}

#[test]
fn ensure_vlan_of_uplink_makes_a_separate_bridge() {
    let Some(topology) = Topology::new() else { return };
    let network = json!({"profile": "vlan", "uplink": "uplink", "vlan": 20});
    let segment = segment(&network, "10.0.0.1");
    if let Err(error) = topology.ensure(&segment) {
        assert!(text(&error).contains("modprobe 8021q"), "{}", text(&error));
        topology.release(&segment).unwrap();
        assert_eq!(topology.links(), ["uplink"]);
        return skip(
            "this kernel has no VLAN sub-interfaces (VLAN_8021Q): only the plan is checked",
        );
    }
    let vm = machine(&topology, "port0");
    let nic = nic("port0", &segment);
    plug(&topology, &nic);
    assert_confined_to_its_vlan(&topology, &vm);
    // The host carries the VLAN but has no address on it that a VM can reach.
    let at_home = SocketAddr::from(([192, 0, 2, 1], 2222));
    let _listener = topology.host.run(|| TcpListener::bind(at_home).unwrap());
    vm.ip("route add 192.0.2.1/32 dev eth0 src 10.0.0.5");
    assert!(!connects(&vm, at_home), "the host");
    topology.host.run(|| filter::remove(&[nic])).unwrap();
    topology.host.ip("link delete port0");
    assert!(topology.release(&segment).unwrap());
    assert_eq!(topology.links(), ["uplink"]);
}

#[test]
fn plug_into_filtering_bridge_tags_the_port() {
    let Some(topology) = Topology::new() else { return };
    topology.host.ip("link add br0 type bridge");
    topology.host.ip("link set br0 up");
    let segment = Segment { vlan: Some(20), ..existing("br0") };
    let refused = topology.plug("bqvlann0", &segment).unwrap_err();
    assert!(
        text(&refused).starts_with("BadConfig: bridge 'br0' does not filter VLANs"),
        "{}",
        text(&refused)
    );
    if !can(&topology.host, "link set br0 type bridge vlan_filtering 1") {
        return skip(
            "this kernel has no VLAN filtering (BRIDGE_VLAN_FILTERING): only the plan is checked",
        );
    }
    let vlans =
        |port: &str| bridge(&topology.host, &format!("vlan show dev {port}"))[0]["vlans"].clone();
    let untagged = json!([{"vlan": 20, "flags": ["PVID", "Egress Untagged"]}]);
    let plug_of_its_own = topology.plug("bqvlann0", &segment).unwrap();
    assert_eq!(vlans("bqvlann0"), untagged);
    topology.unplug("bqvlann0", plug_of_its_own.queues);

    topology.host.ip("link set uplink master br0");
    bridge_vlan_of_the_uplink(&topology);
    let vm = machine(&topology, "port0");
    plug(&topology, &nic("port0", &segment));
    assert_eq!(vlans("port0"), untagged);
    let known = bridge(&topology.host, "fdb show br br0");
    let entry =
        known.as_array().unwrap().iter().find(|entry| entry["mac"] == MAC && entry["vlan"] == 20);
    let entry = entry.unwrap_or_else(|| panic!("{known:#}"));
    assert_eq!((&entry["ifname"], &entry["state"]), (&json!("port0"), &json!("static")), "{entry}");
    assert_confined_to_its_vlan(&topology, &vm);
}

/// Configures VLANs 20 and 30 on the uplink, as an operator does.
fn bridge_vlan_of_the_uplink(topology: &Topology) {
    for vlan in ["20", "30"] {
        let add = || {
            Command::new("bridge")
                .args(["vlan", "add", "dev", "uplink", "vid", vlan])
                .status()
                .unwrap()
        };
        assert!(topology.host.run(add).success());
    }
}
