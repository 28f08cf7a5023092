//! Which segment follows from which configuration and request.

use serde_json::{Value, json};

use super::*;
use crate::schema::Property;

fn plan(network: &Value, ip: &str, netmask: &str, gateway: &str) -> Result<Segment, String> {
    let network = Network::from_json(network).map_err(|error| error.to_string())?;
    let profile = Profile::load(&network.profile, None).map_err(|error| error.report())?;
    let address = |text: &str| (!text.is_empty()).then(|| text.parse().unwrap());
    let requested =
        Requested { ip: address(ip), netmask: address(netmask), gateway: address(gateway), ..Default::default() };
    match place("lab", &network, &profile, &requested) {
        Ok(Place::Bridge(segment)) => Ok(segment),
        Ok(Place::User(user)) => panic!("{user:?}"),
        Err(error) => Err(format!("{:?}: {}", error.kind(), error.report())),
    }
}

fn host_address_of(segment: Segment) -> String {
    match segment.keeper {
        Keeper::Us { addresses, .. } => addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
        Keeper::Operator => "operator".to_owned(),
    }
}

#[test]
fn the_record_of_a_segment() {
    // Records outlive binaries: what is read here today must be read for ever.
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
          "masquerade": true
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
fn nat_follows_the_manifest_unless_the_operator_decided() {
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
fn what_does_not_fit_names_both_sides() {
    let refusal = |network: Value, ip, netmask, gateway| plan(&network, ip, netmask, gateway).unwrap_err();
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
    BadRequest: host network 'lab' has the subnet 10.0.0.0/24, which the netmask 255.255.0.0 of ip 10.0.0.5 leaves
    BadRequest: host network 'lab' has the subnet 10.0.0.0/24, which the ip fd00::5 is not in
    BadRequest: host network 'lab' has the subnet 10.0.0.0/24, which the gateway 10.1.0.1 is not in
    BadConfig: host network 'lab' has the gateway 10.1.0.1, which is not in its subnet 10.0.0.0/24
    BadRequest: host network 'lab' has no subnet of its own, and the request brings no netmask
    Hint: give the subnet in the manifest a gateway and a range, or set networks.lab.subnet
    BadRequest: host network 'lab' has no subnet of its own, and the request brings no gateway
    Hint: give the subnet in the manifest a gateway and a range, or set networks.lab.subnet
    BadRequest: host network 'lab' can not have netmask 255.0.255.0 and gateway 10.0.0.1
    BadRequest: host network 'lab' can not be as wide as 10.0.0.1/0: /8 is the widest
    bridge: expected a link name of 1 to 15 letters, digits, ".", "_" and "-", got a string
    BadConfig: host network 'lab' has the profile 'bridge' and no bridge
    Hint: set networks.lab.bridge to a bridge of this host
    BadConfig: host network 'lab' has the profile 'bridge', where 'subnet' says nothing
    "#);
}

#[test]
fn a_bridge_of_the_operators_is_taken_as_it_is() {
    let segment = plan(&json!({"profile": "bridge", "bridge": "br0", "mtu": 9000}), "10.9.9.9", "", "").unwrap();
    assert_eq!((segment.bridge.as_str(), segment.mtu, &segment.keeper), ("br0", Some(9000), &Keeper::Operator));
}

proptest::proptest! {
    #[test]
    fn nothing_a_request_says_panics_or_leaves_its_subnet(
        ip: Option<IpAddr>, netmask: Option<IpAddr>, gateway: Option<IpAddr>, prefix in 0u8..=32,
    ) {
        let requested = Requested { ip, netmask, gateway, ..Default::default() };
        let nat = Profile::load("nat", None).unwrap();
        for subnet in [None, Some(IpNetwork::new([10, 0, 0, 0].into(), prefix).unwrap())] {
            let network = Network { subnet, ..Network::nat() };
            let Ok(Place::Bridge(segment)) = place("lab", &network, &nat, &requested) else { continue };
            let Keeper::Us { addresses, .. } = segment.keeper else { panic!("nat is ours") };
            proptest::prop_assert!(ip.is_none_or(|ip| addresses[0].contains(ip) && addresses[0].ip() != ip));
            proptest::prop_assert!(gateway.is_none_or(|gateway| addresses[0].ip() == gateway));
        }
    }
}
