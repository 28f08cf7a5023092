//! Plans of segments, and the refusals of contradictory requests.

use serde_json::{Value, json};

use super::*;
use crate::schema::Property;

fn plan(network: &Value, ip: &str, netmask: &str, gateway: &str) -> Result<Segment, String> {
    let network = Network::from_json(network).map_err(|error| error.to_string())?;
    let profile = Profile::load(&network.profile, None).map_err(|error| error.report())?;
    let address = |text: &str| (!text.is_empty()).then(|| text.parse().unwrap());
    let requested = Requested {
        ip: address(ip),
        netmask: address(netmask),
        gateway: address(gateway),
        ..Default::default()
    };
    match plan_nic("lab", &network, &profile, &requested) {
        Ok(NicPlan::Bridge(segment)) => Ok(segment),
        Ok(NicPlan::User(user)) => panic!("{user:?}"),
        Err(error) => Err(format!("{:?}: {}", error.kind(), error.report())),
    }
}

fn host_address_of(segment: Segment) -> String {
    match segment.keeper {
        Keeper::Cpi { addresses, .. } => {
            addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        }
        Keeper::Operator => "operator".to_owned(),
    }
}

#[test]
fn the_record_of_a_segment() {
    // Records outlive binaries: every later version must read this text.
    let nat = plan(&json!({}), "10.0.0.5", "255.255.255.0", "10.0.0.1").unwrap();
    let text = serde_json::to_string_pretty(&nat).unwrap();
    insta::assert_snapshot!(text, @r#"
    {
      "network": "lab",
      "bridge": "bosh-nat0",
      "keeper": {
        "us": {
          "addresses": [
            "10.0.0.1/24"
          ],
          "masquerade": true,
          "services": []
        }
      }
    }
    "#);
    assert_eq!(serde_json::from_str::<Segment>(&text).unwrap(), nat);
    let bridge = existing_bridge(&LinkName::parse("br0").unwrap(), None, None);
    let text = serde_json::to_string(&bridge).unwrap();
    insta::assert_snapshot!(text, @r#"{"network":"br0","bridge":"br0","keeper":"operator"}"#);
    assert_eq!(serde_json::from_str::<Segment>(&text).unwrap(), bridge);
}

#[test]
fn nat_follows_the_manifest_unless_the_operator_configured_it() {
    let address = |network: Value, ip, netmask, gateway| {
        plan(&network, ip, netmask, gateway).map(host_address_of).unwrap_or_else(|error| error)
    };
    let mask = "255.255.255.0";
    assert_eq!(address(json!({}), "10.0.0.5", mask, "10.0.0.1"), "10.0.0.1/24");
    assert_eq!(address(json!({"gateway": "10.0.0.9"}), "10.0.0.5", mask, ""), "10.0.0.9/24");
    let subnet = json!({"subnet": "10.0.0.0/16"});
    assert_eq!(address(subnet.clone(), "10.0.7.5", mask, "10.0.7.1"), "10.0.7.1/16");
    assert_eq!(address(subnet, "", "", ""), "10.0.0.1/16");
    let long = "ffff:ffff:ffff:ffff:0000:0000:0000:0000";
    assert_eq!(address(json!({}), "fd00::5", long, "fd00::1"), "fd00::1/64");
    assert_eq!(address(json!({"subnet": "10.0.0.0/31"}), "", "", ""), "10.0.0.1/31");
}

#[test]
fn a_request_that_does_not_fit_is_refused_with_both_values() {
    let refusal =
        |network: Value, ip, netmask, gateway| plan(&network, ip, netmask, gateway).unwrap_err();
    let mask = "255.255.255.0";
    let configured = || json!({"subnet": "10.0.0.0/24", "gateway": "10.0.0.1"});
    let refusals = [
        refusal(configured(), "10.0.1.5", mask, "10.0.0.1"),
        refusal(configured(), "10.0.0.5", mask, "10.0.0.254"),
        refusal(configured(), "10.0.0.1", mask, "10.0.0.1"),
        refusal(configured(), "10.0.0.5", "255.255.0.0", "10.0.0.1"),
        refusal(configured(), "fd00::5", "", ""),
        refusal(json!({"subnet": "10.0.0.0/24"}), "10.0.0.5", mask, "10.1.0.1"),
        refusal(json!({"subnet": "10.0.0.0/24", "gateway": "10.1.0.1"}), "10.0.0.5", mask, ""),
        refusal(json!({}), "10.0.0.5", "", "10.0.0.1"),
        refusal(json!({}), "10.0.0.5", mask, ""),
        refusal(json!({}), "10.0.0.5", "255.0.255.0", "10.0.0.1"),
        refusal(json!({}), "10.0.0.5", "0.0.0.0", "10.0.0.1"),
        refusal(json!({"bridge": "a/b"}), "10.0.0.5", mask, "10.0.0.1"),
        refusal(json!({"profile": "bridge"}), "10.0.0.5", mask, "10.0.0.1"),
        refusal(json!({"profile": "bridge", "bridge": "br0", "subnet": "10.0.0.0/24"}), "", "", ""),
    ];
    insta::assert_snapshot!(refusals.join("\n"), @r#"
    BadRequest: host network 'lab' has the subnet 10.0.0.0/24, which the ip 10.0.1.5 is not in
    BadRequest: host network 'lab' has the gateway 10.0.0.1, the request wants 10.0.0.254
    BadRequest: host network 'lab' has the gateway 10.0.0.1, which the request wants as the VM's ip
    BadRequest: host network 'lab' has the subnet 10.0.0.0/24, which the netmask 255.255.0.0 of ip 10.0.0.5 exceeds
    BadRequest: host network 'lab' has the subnet 10.0.0.0/24, which the ip fd00::5 is not in
    BadRequest: host network 'lab' has the subnet 10.0.0.0/24, which the gateway 10.1.0.1 is not in
    BadConfig: host network 'lab' has the gateway 10.1.0.1, which is not in its subnet 10.0.0.0/24
    BadRequest: host network 'lab' has no subnet of its own, and the request has no netmask
    Hint: give the subnet in the manifest a gateway and a range, or set networks.lab.subnet
    BadRequest: host network 'lab' has no subnet of its own, and the request has no gateway
    Hint: give the subnet in the manifest a gateway and a range, or set networks.lab.subnet
    BadRequest: host network 'lab' cannot have netmask 255.0.255.0 and gateway 10.0.0.1
    BadRequest: host network 'lab' cannot be as wide as 10.0.0.1/0: /8 is the widest
    bridge: expected a link name of 1 to 15 letters, digits, ".", "_" and "-", got a string
    BadConfig: host network 'lab' has the profile 'bridge' and no bridge
    Hint: set networks.lab.bridge to a bridge of this host
    BadConfig: host network 'lab' has the profile 'bridge', where 'subnet' has no effect
    "#);
}

#[test]
fn an_operators_bridge_is_used_unchanged() {
    let segment =
        plan(&json!({"profile": "bridge", "bridge": "br0", "mtu": 9000}), "10.9.9.9", "", "")
            .unwrap();
    assert_eq!(
        (segment.bridge.as_str(), segment.mtu, &segment.keeper),
        ("br0", Some(9000), &Keeper::Operator)
    );
}

proptest::proptest! {
    #[test]
    fn no_request_panics_or_leaves_its_subnet(
        ip: Option<IpAddr>, netmask: Option<IpAddr>, gateway: Option<IpAddr>, prefix in 0u8..=32,
    ) {
        let requested = Requested { ip, netmask, gateway, ..Default::default() };
        let nat = Profile::load("nat", None).unwrap();
        for subnet in [None, Some(IpNetwork::new([10, 0, 0, 0].into(), prefix).unwrap())] {
            let network = Network { subnet, ..Network::nat() };
            let planned = plan_nic("lab", &network, &nat, &requested);
            let Ok(NicPlan::Bridge(segment)) = planned else { continue };
            let Keeper::Cpi { addresses, .. } = segment.keeper else { panic!("nat is ours") };
            let host = addresses[0];
            proptest::prop_assert!(ip.is_none_or(|ip| host.contains(ip) && host.ip() != ip));
            proptest::prop_assert!(gateway.is_none_or(|gateway| host.ip() == gateway));
        }
    }
}

#[test]
fn a_key_without_effect_in_the_profile_is_refused() {
    let refusal =
        |network: Value| plan(&network, "10.0.0.5", "255.255.255.0", "10.0.0.1").unwrap_err();
    let refusals = [
        refusal(json!({"profile": "nta"})),
        refusal(json!({"vlan": 5})),
        refusal(json!({"uplink": "eth0"})),
        refusal(json!({"profile": "vlan", "bridge": "br0"})),
        refusal(json!({"profile": "vlan", "vlan": 5})),
        refusal(json!({"profile": "user", "bridge": "br0"})),
        refusal(json!({"vlan": 4095})),
    ];
    insta::assert_snapshot!(refusals.join("\n"), @r"
    network profile 'nta' does not exist
    Hint: use a built-in profile (nat, routed, isolated, bridge, vlan, user), or put 'nta.toml' into network_profiles_dir
    BadConfig: host network 'lab' has the profile 'nat', where 'vlan' has no effect
    BadConfig: host network 'lab' has the profile 'nat', where 'uplink' has no effect
    BadRequest: host network 'lab' has no VLAN of its own, and the request has none
    Hint: give the subnet in the manifest the cloud property vlan, or set networks.lab.vlan
    BadConfig: host network 'lab' has the profile 'vlan' and no bridge
    Hint: set networks.lab.bridge to a bridge of this host
    BadConfig: host network 'lab' has the profile 'user', where 'bridge' has no effect
    vlan: expected a whole number from 1 to 4094, got 4095
    ");
}

#[test]
fn a_request_chooses_its_vlan_where_the_operator_did_not() {
    let place = |configured: Value, vlan| {
        let network = Network::from_json(&configured).unwrap();
        let profile = Profile::load(&network.profile, None).unwrap();
        match plan_nic("lab", &network, &profile, &Requested { vlan, ..Requested::default() }) {
            Ok(NicPlan::Bridge(segment)) => serde_json::to_string(&segment).unwrap(),
            Ok(NicPlan::User(user)) => panic!("{user:?}"),
            Err(error) => error.report(),
        }
    };
    let trunk = json!({"profile": "vlan", "uplink": "eth0"});
    let fixed = json!({"profile": "vlan", "bridge": "br0", "vlan": 7});
    let places = [
        place(trunk.clone(), Some(20)),
        place(trunk, None),
        place(fixed.clone(), None),
        place(fixed, Some(8)),
        place(json!({"profile": "bridge", "bridge": "br0"}), Some(8)),
    ];
    insta::assert_snapshot!(places.join("\n"), @r#"
    {"network":"lab","bridge":"bosh-vlan20","keeper":{"us":{"addresses":[],"masquerade":false,"uplink":{"link":"eth0","vlan":20}}}}
    host network 'lab' has no VLAN of its own, and the request has none
    Hint: give the subnet in the manifest the cloud property vlan, or set networks.lab.vlan
    {"network":"lab","bridge":"br0","vlan":7,"keeper":"operator"}
    host network 'lab' is VLAN 7, the request wants 8
    host network 'lab' has the profile 'bridge', where a vlan has no effect
    "#);
}

#[test]
fn user_networking_needs_an_address_and_no_bridge() {
    let network = Network::from_json(&json!({"profile": "user", "subnet": "10.0.2.0/24"})).unwrap();
    let profile = Profile::load("user", None).unwrap();
    let requested = Requested { ip: "10.0.2.15".parse().ok(), ..Requested::default() };
    let NicPlan::User(user) = plan_nic("lab", &network, &profile, &requested).unwrap() else {
        panic!("no bridge")
    };
    let text = serde_json::to_string(&user).unwrap();
    insta::assert_snapshot!(text, @r#"
    {"network":"lab","gateway":"10.0.2.1/24","guest":"10.0.2.15"}
    "#);
    assert_eq!(serde_json::from_str::<UserNetwork>(&text).unwrap(), user);
    let refusal = |network: Value, ip: &str| {
        let requested = Requested { ip: ip.parse().ok(), ..Requested::default() };
        plan_nic("lab", &Network::from_json(&network).unwrap(), &profile, &requested)
            .unwrap_err()
            .report()
    };
    let refusals = [
        refusal(json!({"profile": "user"}), "10.0.2.15"),
        refusal(json!({"profile": "user", "gateway": "10.0.2.1"}), ""),
        refusal(json!({"profile": "user", "subnet": "10.0.2.0/30"}), "10.0.2.2"),
        refusal(
            json!({
                "profile": "user",
                "subnet": "10.0.2.0/24",
                "pool": "fd00::1-fd00::ffff:ffff:ffff:ffff",
            }),
            "",
        ),
        refusal(json!({"profile": "user", "subnet": "fd00::/64"}), ""),
        refusal(json!({"profile": "user", "subnet": "fd00::/64"}), "fd00::5"),
    ];
    insta::assert_snapshot!(refusals.join("\n"), @r"
    host network 'lab' has no subnet of its own, and the request has no gateway
    Hint: give the subnet in the manifest a gateway and a range, or set networks.lab.subnet
    host network 'lab' has no subnet of its own, and the request has no netmask
    Hint: give the subnet in the manifest a gateway and a range, or set networks.lab.subnet
    host network 'lab' cannot be as narrow as 10.0.2.1/30: /29 is the narrowest
    host network 'lab' has a pool that is not in its subnet 10.0.2.0/24
    Hint: set networks.lab.pool to addresses of the subnet
    host network 'lab' has the profile 'user', which is IPv4 only
    host network 'lab' has the profile 'user', which is IPv4 only
    ");
}

#[test]
fn a_default_guest_address_is_one_of_the_pool() {
    let profile = Profile::load("user", None).unwrap();
    let guest = |network: Value| {
        let network = Network::from_json(&network).unwrap();
        let NicPlan::User(user) =
            plan_nic("lab", &network, &profile, &Requested::default()).unwrap()
        else {
            panic!()
        };
        format!("{} {}", user.gateway, user.guest)
    };
    assert_eq!(guest(json!({"profile": "user"})), "10.0.2.2/24 10.0.2.15");
    assert_eq!(guest(json!({"profile": "user", "subnet": "10.6.0.0/16"})), "10.6.0.1/16 10.6.0.15");
    assert_eq!(guest(json!({"profile": "user", "subnet": "10.6.0.8/29"})), "10.6.0.9/29 10.6.0.10");
    let pool = json!({
        "profile": "user",
        "subnet": "10.6.0.0/24",
        "gateway": "10.6.0.15",
        "pool": "10.6.0.15-10.6.0.20",
    });
    assert_eq!(guest(pool), "10.6.0.15/24 10.6.0.16");
}

#[test]
fn a_request_chooses_among_private_subnets() {
    for (subnet, private) in [
        ("10.0.0.0/8", true),
        ("172.31.0.0/16", true),
        ("172.32.0.0/16", false),
        ("172.0.0.0/8", false),
        ("169.254.169.0/24", false),
        ("fd12::/64", true),
        ("2a00::/64", false),
    ] {
        assert_eq!(is_private(subnet.parse().unwrap()), private, "{subnet}");
    }
    let refused = plan(&json!({}), "8.8.8.8", "255.255.255.0", "8.8.8.1").unwrap_err();
    insta::assert_snapshot!(refused, @r"
    BadRequest: host network 'lab' cannot have 8.8.8.0/24, which the request chose: it is no private subnet
    Hint: if these addresses belong to your site, set networks.lab.subnet
    ");
    assert!(plan(&json!({"subnet": "8.8.8.0/24"}), "8.8.8.8", "255.255.255.0", "8.8.8.1").is_ok());
}

#[test]
fn segments_of_the_configuration_alone() {
    let configured = |network: Value| {
        let network = Network::from_json(&network).unwrap();
        let profile = Profile::load(&network.profile, None).unwrap();
        configured_segment("lab", &network, &profile)
            .unwrap()
            .map(|segment| serde_json::to_string(&segment).unwrap())
    };
    let segments = [
        configured(json!({})),
        configured(json!({"profile": "routed", "subnet": "10.7.0.0/16"})),
        configured(json!({"profile": "vlan", "uplink": "eth0"})),
        configured(json!({"profile": "user"})),
    ];
    insta::assert_snapshot!(segments.map(Option::unwrap_or_default).join("\n"), @r#"
    {"network":"lab","bridge":"bosh-nat0","keeper":{"us":{"addresses":[],"masquerade":true,"services":[]}}}
    {"network":"lab","bridge":"bosh-routed0","keeper":{"us":{"addresses":["10.7.0.1/16"],"masquerade":false,"services":[]}}}
    "#);
}
