//! The missing changes of every profile, and none where everything is in place.

use serde_json::json;

use super::*;
use crate::config::Network;
use crate::net::plan::{NicPlan, Requested, plan_nic};
use crate::net::profile::Profile;
use crate::schema::Property;

fn name(text: &str) -> LinkName {
    LinkName::parse(text).unwrap()
}

fn segment(network: &serde_json::Value) -> Segment {
    let network = Network::from_json(network).unwrap();
    let profile = Profile::load(&network.profile, None).unwrap();
    let requested = Requested {
        ip: "10.0.0.5".parse().ok(),
        netmask: "255.255.255.0".parse().ok(),
        gateway: "10.0.0.1".parse().ok(),
        ..Default::default()
    };
    match plan_nic("lab", &network, &profile, &requested).unwrap() {
        NicPlan::Bridge(segment) => segment,
        NicPlan::User(user) => panic!("{user:?}"),
    }
}

/// A host whose only link is an uplink with an MTU of 1450 bytes.
fn bare_host() -> Observed {
    let world = Link { name: "eth0".into(), index: 2, mtu: 1450, up: true, ..Link::default() };
    let settings = [("ipv4/ip_forward", "0"), ("ipv6/conf/all/forwarding", "0")];
    let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    Observed {
        upstream: Some(world),
        other_addresses: vec!["192.0.2.1/24".parse().unwrap()],
        settings,
        ..Observed::default()
    }
}

/// A host with an operator's bridge.
fn with_bridge(bridge: &str) -> Observed {
    let kind = Some("bridge".to_owned());
    let bridge =
        Link { name: bridge.into(), index: 3, mtu: 1500, up: true, kind, ..Link::default() };
    Observed { bridge: Some(bridge), ..bare_host() }
}

fn lines(changes: &[Change]) -> String {
    changes.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// The commands that a new VM needs on a host.
fn all(network: &serde_json::Value, observed: &Observed) -> String {
    let segment = segment(network);
    let mut changes = diff(&segment, observed).unwrap();
    changes.extend(plug(&segment, observed, &guarded_port(), None, 1500));
    lines(&changes)
}

/// The port of a VM with `anti_spoof`.
fn guarded_port() -> Port {
    let pinned_mac = Some([2, 0, 0, 0, 0, 1].into());
    Port { pinned_mac, ..name("bqtapn0").into() }
}

#[test]
fn nat_on_a_bare_host() {
    insta::assert_snapshot!(all(&json!({}), &bare_host()), @r#"
    ip link add bosh-nat0 address 02:40:18:9a:5b:37 mtu 1450 type bridge stp_state 0 forward_delay 0
    sysctl -w net.ipv6.conf.bosh-nat0.accept_ra=0
    ip link set bosh-nat0 alias 'bosh-qemu-cpi:lab' up
    ip address add 10.0.0.1/24 dev bosh-nat0
    sysctl -w net.ipv4.ip_forward=1
    nft table inet bosh-qemu-bosh-nat0 {
        chain postrouting {
            type nat hook postrouting priority 100; policy accept;
            ip saddr 10.0.0.0/24 oifname != "bosh-nat0" masquerade
            ip saddr 10.0.0.0/24 oifname "bosh-nat0" ct status & dnat == dnat masquerade
        }
        chain forward {
            type filter hook forward priority 0; policy accept;
            iifname "bosh-nat0" meta nfproto ipv4 ip daddr & 255.255.0.0 == 169.254.0.0 counter drop
            iifname "bosh-nat0" meta nfproto ipv4 ip daddr 168.63.129.16 counter drop
            iifname "bosh-nat0" meta nfproto ipv4 ip daddr 100.100.100.200 counter drop
        }
        chain host {
            type filter hook input priority 0; policy accept;
            iifname "bosh-nat0" ct state & (established | related) != 0 return
            iifname "bosh-nat0" meta nfproto ipv6 meta l4proto ipv6-icmp icmpv6 type 135-136 return
            iifname "bosh-nat0" meta nfproto ipv4 meta l4proto icmp icmp type 8 return
            iifname "bosh-nat0" meta nfproto ipv6 meta l4proto ipv6-icmp icmpv6 type 128 return
            iifname "bosh-nat0" counter drop
        }
        chain speaks {
            type filter hook output priority 0; policy accept;
            oifname "bosh-nat0" meta mark set meta mark | 0x1000
        }
    }
    ip link set bqtapn0 mtu 1500 master bosh-nat0
    ip link set bqtapn0 type bridge_slave learning off group_fwd_mask 0xfffd && bridge fdb replace 02:00:00:00:00:01 dev bqtapn0 master static sticky
    ip link set bqtapn0 up
    "#);
}

#[test]
fn routed_on_a_bare_host() {
    insta::assert_snapshot!(all(&json!({"profile": "routed", "mtu": 9000}), &bare_host()), @r#"
    ip link add bosh-routed0 address 02:c9:9a:7f:1c:07 mtu 9000 type bridge stp_state 0 forward_delay 0
    sysctl -w net.ipv6.conf.bosh-routed0.accept_ra=0
    ip link set bosh-routed0 alias 'bosh-qemu-cpi:lab' up
    ip address add 10.0.0.1/24 dev bosh-routed0
    sysctl -w net.ipv4.ip_forward=1
    nft table inet bosh-qemu-bosh-routed0 {
        chain forward {
            type filter hook forward priority 0; policy accept;
            iifname "bosh-routed0" meta nfproto ipv4 ip daddr & 255.255.0.0 == 169.254.0.0 counter drop
            iifname "bosh-routed0" meta nfproto ipv4 ip daddr 168.63.129.16 counter drop
            iifname "bosh-routed0" meta nfproto ipv4 ip daddr 100.100.100.200 counter drop
        }
        chain host {
            type filter hook input priority 0; policy accept;
            iifname "bosh-routed0" ct state & (established | related) != 0 return
            iifname "bosh-routed0" meta nfproto ipv6 meta l4proto ipv6-icmp icmpv6 type 135-136 return
            iifname "bosh-routed0" meta nfproto ipv4 meta l4proto icmp icmp type 8 return
            iifname "bosh-routed0" meta nfproto ipv6 meta l4proto ipv6-icmp icmpv6 type 128 return
            iifname "bosh-routed0" counter drop
        }
        chain speaks {
            type filter hook output priority 0; policy accept;
            oifname "bosh-routed0" meta mark set meta mark | 0x1000
        }
    }
    ip link set bqtapn0 mtu 1500 master bosh-routed0
    ip link set bqtapn0 type bridge_slave learning off group_fwd_mask 0xfffd && bridge fdb replace 02:00:00:00:00:01 dev bqtapn0 master static sticky
    ip link set bqtapn0 up
    "#);
}

#[test]
fn isolated_on_a_bare_host() {
    insta::assert_snapshot!(all(&json!({"profile": "isolated"}), &bare_host()), @r#"
    ip link add bosh-isolated0 address 02:b9:90:75:69:87 mtu 1450 type bridge stp_state 0 forward_delay 0
    sysctl -w net.ipv6.conf.bosh-isolated0.accept_ra=0
    ip link set bosh-isolated0 alias 'bosh-qemu-cpi:lab' up
    ip address add 10.0.0.1/24 dev bosh-isolated0
    nft table inet bosh-qemu-bosh-isolated0 {
        chain forward {
            type filter hook forward priority 0; policy accept;
            iifname "bosh-isolated0" oifname "bosh-isolated0" counter drop
            iifname "bosh-isolated0" counter drop
            oifname "bosh-isolated0" counter drop
        }
        chain host {
            type filter hook input priority 0; policy accept;
            iifname "bosh-isolated0" ct state & (established | related) != 0 return
            iifname "bosh-isolated0" meta nfproto ipv6 meta l4proto ipv6-icmp icmpv6 type 135-136 return
            iifname "bosh-isolated0" meta nfproto ipv4 meta l4proto icmp icmp type 8 return
            iifname "bosh-isolated0" meta nfproto ipv6 meta l4proto ipv6-icmp icmpv6 type 128 return
            iifname "bosh-isolated0" counter drop
        }
        chain speaks {
            type filter hook output priority 0; policy accept;
            oifname "bosh-isolated0" meta mark set meta mark | 0x1000
        }
    }
    ip link set bqtapn0 mtu 1500 master bosh-isolated0
    bridge link set dev bqtapn0 isolated on
    ip link set bqtapn0 type bridge_slave learning off group_fwd_mask 0xfffd && bridge fdb replace 02:00:00:00:00:01 dev bqtapn0 master static sticky
    ip link set bqtapn0 up
    "#);
}

#[test]
fn an_operators_bridge_gets_a_tap() {
    let network = json!({"profile": "bridge", "bridge": "br0"});
    insta::assert_snapshot!(all(&network, &with_bridge("br0")), @r"
    ip link set bqtapn0 mtu 1500 master br0
    ip link set bqtapn0 type bridge_slave learning off group_fwd_mask 0xfffd && bridge fdb replace 02:00:00:00:00:01 dev bqtapn0 master static sticky
    ip link set bqtapn0 up
    ");
}

#[test]
fn a_vlan_of_a_bridge() {
    let network = json!({"profile": "vlan", "bridge": "br0", "vlan": 20});
    let mut observed = with_bridge("br0");
    let error = diff(&segment(&network), &observed).unwrap_err();
    insta::assert_snapshot!(error.report(), @r"
    bridge 'br0' does not filter VLANs
    Hint: ip link set br0 type bridge vlan_filtering 1; if the kernel lacks BRIDGE_VLAN_FILTERING, give the network an uplink in place of the bridge
    ");
    let bridge = observed.bridge.as_mut().unwrap();
    (bridge.vlan_filtering, bridge.default_vlan) = (true, Some(1));
    insta::assert_snapshot!(all(&network, &observed), @r"
    ip link set bqtapn0 mtu 1500 master br0
    bridge vlan add dev bqtapn0 vid 20 pvid untagged && bridge vlan del dev bqtapn0 vid 1
    ip link set bqtapn0 type bridge_slave learning off group_fwd_mask 0xfffd && bridge fdb replace 02:00:00:00:00:01 dev bqtapn0 master static sticky
    ip link set bqtapn0 up
    ");
    observed.bridge.as_mut().unwrap().default_vlan = Some(20);
    insta::assert_snapshot!(all(&network, &observed), @r"
    ip link set bqtapn0 mtu 1500 master br0
    bridge vlan add dev bqtapn0 vid 20 pvid untagged
    ip link set bqtapn0 type bridge_slave learning off group_fwd_mask 0xfffd && bridge fdb replace 02:00:00:00:00:01 dev bqtapn0 master static sticky
    ip link set bqtapn0 up
    ");
}

#[test]
fn a_vlan_of_an_uplink() {
    let network = json!({"profile": "vlan", "uplink": "eth0", "vlan": 20});
    insta::assert_snapshot!(all(&network, &bare_host()), @r#"
    ip link add bosh-vlan20 address 02:35:f9:1e:47:00 mtu 1450 type bridge stp_state 0 forward_delay 0
    sysctl -w net.ipv6.conf.bosh-vlan20.accept_ra=0
    sysctl -w net.ipv6.conf.bosh-vlan20.disable_ipv6=1
    ip link set bosh-vlan20 alias 'bosh-qemu-cpi:lab' up
    ip link add bqv20-kroebn link eth0 type vlan id 20
    ip link set bqv20-kroebn master bosh-vlan20 up
    nft table inet bosh-qemu-bosh-vlan20 {
        chain forward {
            type filter hook forward priority 0; policy accept;
            iifname "bosh-vlan20" oifname "bosh-vlan20" return
            iifname "bosh-vlan20" counter drop
            oifname "bosh-vlan20" counter drop
        }
        chain host {
            type filter hook input priority 0; policy accept;
            iifname "bosh-vlan20" counter drop
        }
    }
    ip link set bqtapn0 mtu 1500 master bosh-vlan20
    ip link set bqtapn0 type bridge_slave learning off group_fwd_mask 0xfffd && bridge fdb replace 02:00:00:00:00:01 dev bqtapn0 master static sticky
    ip link set bqtapn0 up
    "#);
    let error = diff(&segment(&network), &Observed { upstream: None, ..bare_host() }).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NetworkNotFound);
}

/// A host after the changes of [`nat_on_a_bare_host`].
fn done(segment: &Segment) -> Observed {
    let bridge = Link {
        name: segment.bridge.to_string(),
        index: 3,
        kind: Some("bridge".into()),
        alias: Some("bosh-qemu-cpi:lab".into()),
        mac: Some(bridge_mac(&segment.bridge)),
        mtu: 1450,
        up: true,
        ..Link::default()
    };
    let address: IpNetwork = "10.0.0.1/24".parse().unwrap();
    let mut observed = Observed {
        bridge: Some(bridge),
        bridge_addresses: vec![address],
        routes: vec![subnet(address)],
        ..bare_host()
    };
    observed.rules_current = true;
    let settings = [("ipv4/ip_forward", "1"), ("ipv6/conf/bosh-nat0/accept_ra", "0")];
    observed.settings.extend(settings.map(|(key, value)| (key.to_owned(), value.to_owned())));
    observed
}

#[test]
fn a_complete_host_needs_no_change() {
    let segment = segment(&json!({}));
    assert_eq!(lines(&diff(&segment, &done(&segment)).unwrap()), "");
    let uplink_changed = Link { mtu: 9000, ..Link::default() };
    let observed = Observed { upstream: Some(uplink_changed), ..done(&segment) };
    assert_eq!(lines(&diff(&segment, &observed).unwrap()), "", "the guests have the bridge's MTU");
}

#[test]
fn only_the_missing_change_is_made() {
    let segment = segment(&json!({}));
    let repair = |break_it: &dyn Fn(&mut Observed)| {
        let mut observed = done(&segment);
        break_it(&mut observed);
        lines(&diff(&segment, &observed).unwrap())
    };
    let tap = |controller| Link {
        name: "bqtapn0".into(),
        index: 9,
        controller,
        group_forward_mask: ALL_GROUP_ADDRESSES,
        ..Link::default()
    };
    let repairs = [
        repair(&|observed| observed.bridge.as_mut().unwrap().up = false),
        repair(&|observed| observed.bridge.as_mut().unwrap().mac = None),
        repair(&|observed| observed.bridge_addresses.clear()),
        repair(&|observed| observed.routes.clear()),
        repair(&|observed| observed.rules_current = false),
        repair(&|observed| drop(observed.settings.insert(FORWARD_V4.into(), "0".into()))),
        repair(&|observed| observed.ports = vec![(guarded_port(), tap(None))]),
        repair(&|observed| observed.ports = vec![(guarded_port(), tap(Some(7)))]),
        repair(&|observed| observed.ports = vec![(guarded_port(), tap(Some(3)))]),
        repair(&|observed| {
            observed.ports = vec![(guarded_port(), Link { learning: true, ..tap(Some(3)) })];
        }),
        repair(&|observed| {
            let of_an_older_version = Link { group_forward_mask: 0, ..tap(Some(3)) };
            observed.ports = vec![(guarded_port(), of_an_older_version)];
        }),
    ];
    insta::assert_snapshot!(repairs.join("\n--\n"), @r#"
    ip link set bosh-nat0 up
    --
    ip link set bosh-nat0 address 02:40:18:9a:5b:37
    --
    ip address add 10.0.0.1/24 dev bosh-nat0
    --
    ip route add 10.0.0.0/24 dev bosh-nat0 src 10.0.0.1 proto kernel scope link
    --
    nft table inet bosh-qemu-bosh-nat0 {
        chain postrouting {
            type nat hook postrouting priority 100; policy accept;
            ip saddr 10.0.0.0/24 oifname != "bosh-nat0" masquerade
            ip saddr 10.0.0.0/24 oifname "bosh-nat0" ct status & dnat == dnat masquerade
        }
        chain forward {
            type filter hook forward priority 0; policy accept;
            iifname "bosh-nat0" meta nfproto ipv4 ip daddr & 255.255.0.0 == 169.254.0.0 counter drop
            iifname "bosh-nat0" meta nfproto ipv4 ip daddr 168.63.129.16 counter drop
            iifname "bosh-nat0" meta nfproto ipv4 ip daddr 100.100.100.200 counter drop
        }
        chain host {
            type filter hook input priority 0; policy accept;
            iifname "bosh-nat0" ct state & (established | related) != 0 return
            iifname "bosh-nat0" meta nfproto ipv6 meta l4proto ipv6-icmp icmpv6 type 135-136 return
            iifname "bosh-nat0" meta nfproto ipv4 meta l4proto icmp icmp type 8 return
            iifname "bosh-nat0" meta nfproto ipv6 meta l4proto ipv6-icmp icmpv6 type 128 return
            iifname "bosh-nat0" counter drop
        }
        chain speaks {
            type filter hook output priority 0; policy accept;
            oifname "bosh-nat0" meta mark set meta mark | 0x1000
        }
    }
    --
    sysctl -w net.ipv4.ip_forward=1
    --
    ip link set bqtapn0 mtu 1450 master bosh-nat0
    ip link set bqtapn0 type bridge_slave learning off group_fwd_mask 0xfffd && bridge fdb replace 02:00:00:00:00:01 dev bqtapn0 master static sticky
    ip link set bqtapn0 up
    --
    ip link set bqtapn0 mtu 1450 master bosh-nat0
    ip link set bqtapn0 type bridge_slave learning off group_fwd_mask 0xfffd && bridge fdb replace 02:00:00:00:00:01 dev bqtapn0 master static sticky
    ip link set bqtapn0 up
    --

    --
    ip link set bqtapn0 type bridge_slave learning off group_fwd_mask 0xfffd && bridge fdb replace 02:00:00:00:00:01 dev bqtapn0 master static sticky
    --
    ip link set bqtapn0 type bridge_slave learning off group_fwd_mask 0xfffd && bridge fdb replace 02:00:00:00:00:01 dev bqtapn0 master static sticky
    "#);
}
