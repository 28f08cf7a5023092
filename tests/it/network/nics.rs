//! NICs from the networks of a request: both families, prefixes, anti-spoofing, and movable
//! addresses.

use std::fs;

use bosh_qemu_cpi::cid::VmCid;
use serde_json::{Value, json};

use crate::support::answer::Answer;
use crate::support::host::{Host, vm_cid};
use crate::support::netns::Namespace;

fn create(host: &Host, stemcell: &str, networks: &Value, properties: &Value) -> Answer {
    let mut properties = properties.clone();
    properties["ram"] = json!(64);
    host.call("create_vm", &json!(["agent-1", stemcell, properties, networks, [], {}]))
}

/// A host that forwards IPv6.
fn host(config: Value) -> Option<Host> {
    let host = Host::with(config)?;
    host.namespace().run(|| fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap());
    Some(host)
}

fn ip4(last: u8) -> Value {
    json!({
        "type": "manual", "ip": format!("10.9.0.{last}"), "netmask": "255.255.255.0",
        "gateway": "10.9.0.1",
    })
}

fn ip6(ip: &str) -> Value {
    json!({"type": "manual", "ip": ip, "netmask": "ffff:ffff:ffff:ffff::", "gateway": "fd00:9::1"})
}

/// Names of the VM's reservations.
fn claims(host: &Host, vm: &VmCid) -> Vec<String> {
    let claims = fs::read_dir(host.path("state/claims")).unwrap().flatten();
    let claims = claims.filter(|claim| {
        fs::read_link(claim.path()).unwrap().to_str() == Some(vm.to_string().as_str())
    });
    let mut names: Vec<_> = claims.map(|claim| claim.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn create_vm_with_ipv4_and_ipv6_networks_gets_two_nics() {
    let Some(host) = host(json!({})) else { return };
    let stemcell = host.stemcell();
    let alone = create(&host, &stemcell, &json!({"six": ip6("fd00:9::5")}), &json!({}));
    let alone = vm_cid(alone.result());
    let mut networks = json!({"four": ip4(6), "six": ip6("fd00:9::6")});
    networks["four"]["default"] = json!(["dns", "gateway"]);
    let both = create(&host, &stemcell, &networks, &json!({}));
    let both = vm_cid(both.result());
    let has = |vm: &VmCid| {
        let nics = host.record(vm).nics;
        let rules = nics
            .iter()
            .map(|nic| nic.rules.as_ref().unwrap().addresses[0].to_string())
            .collect::<Vec<_>>();
        (nics.iter().map(|nic| nic.network.clone()).collect::<Vec<_>>(), rules)
    };
    assert_eq!(has(&alone), (vec!["six".into()], vec!["fd00:9::5/128".into()]));
    assert_eq!(
        has(&both),
        (vec!["four".into(), "six".into()], vec!["10.9.0.6/32".into(), "fd00:9::6/128".into()])
    );
    assert_eq!(
        (claims(&host, &alone).len(), claims(&host, &both).len()),
        (1, 2),
        "{:?}",
        claims(&host, &both)
    );
    let bridge = host.namespace().ip("-brief address show dev bosh-nat0");
    assert!(bridge.contains("10.9.0.1/24") && bridge.contains("fd00:9::1/64"), "{bridge}");
    let settings = fs::read(host.paths(&both).config_drive()).unwrap();
    let settings = String::from_utf8_lossy(&settings);
    for nic in host.record(&both).nics {
        assert!(host.namespace().link(nic.tap().unwrap().0.as_str()).is_some());
        assert!(settings.contains(&format!(r#""mac":"{}""#, nic.mac)), "{}", nic.network);
    }
    for word in [r#""ip":"10.9.0.6""#, r#""ip":"fd00:9::6""#, r#""gateway":"fd00:9::1""#] {
        assert!(settings.contains(word), "{word}");
    }
    let taken = create(&host, &stemcell, &json!({"six": ip6("fd00:9::6")}), &json!({}));
    assert!(taken.failure().message.contains(&format!("is reserved by VM '{both}'")), "{taken:?}");
}

#[test]
fn create_vm_inside_delegated_prefix_of_another_is_refused() {
    let Some(host) = host(json!({})) else { return };
    let stemcell = host.stemcell();
    let mut block = ip6("fd00:9:0:0:1::");
    block["prefix"] = json!("80");
    let vm = create(&host, &stemcell, &json!({"six": block}), &json!({}));
    let vm = vm_cid(vm.result());
    let rules = host.record(&vm).nics[0].rules.clone().unwrap();
    assert_eq!(json!(rules.addresses), json!(["fd00:9:0:0:1::/80"]));
    let inside = create(&host, &stemcell, &json!({"six": ip6("fd00:9:0:0:1::7")}), &json!({}));
    assert!(inside.failure().message.contains(&format!("is reserved by VM '{vm}'")), "{inside:?}");
    assert!(
        create(&host, &stemcell, &json!({"six": ip6("fd00:9:0:0:2::7")}), &json!({}))
            .outcome
            .is_ok()
    );
}

#[test]
fn create_vm_with_shared_nic_group_is_refused() {
    let Some(host) = host(json!({})) else { return };
    let stemcell = host.stemcell();
    let mut networks = json!({"four": ip4(6), "six": ip6("fd00:9::6")});
    for name in ["four", "six"] {
        networks[name]["nic_group"] = json!("0");
    }
    let refused = create(&host, &stemcell, &networks, &json!({}));
    assert_eq!(refused.failure().kind, "NotSupported", "{refused:?}");
    assert!(
        refused.failure().message.contains("networks 'four' and 'six' share a nic_group"),
        "{refused:?}"
    );
    networks["six"]["nic_group"] = json!("1");
    assert!(create(&host, &stemcell, &networks, &json!({})).outcome.is_ok(), "each has its own");
}

#[test]
fn create_vm_with_anti_spoof_off_lifts_the_filter() {
    let free = json!({"subnet": "10.8.0.0/24", "anti_spoof": false, "bridge": "bosh-free0"});
    let Some(host) = host(json!({"networks": {"default": {}, "free": free}})) else { return };
    let stemcell = host.stemcell();
    let rules = |network: &Value, properties: Value| {
        let vm = create(&host, &stemcell, &json!({"a": network}), &properties);
        let vm = vm_cid(vm.result());
        let rules = host.record(&vm).nics[0].rules.clone().unwrap();
        host.ok("delete_vm", &json!([vm]));
        rules
    };
    let mut of_the_subnet = ip4(6);
    of_the_subnet["cloud_properties"] = json!({"anti_spoof": false});
    let of_the_network = json!({
        "type": "manual", "ip": "10.8.0.6", "netmask": "255.255.255.0", "gateway": "10.8.0.1",
        "cloud_properties": {"name": "free"},
    });
    assert!(rules(&ip4(6), json!({})).anti_spoof);
    assert!(!rules(&ip4(6), json!({"anti_spoof": false})).anti_spoof, "the VM's");
    assert!(!rules(&of_the_subnet, json!({})).anti_spoof, "the subnet's");
    assert!(!rules(&of_the_network, json!({})).anti_spoof, "the network's");
    let allowed = rules(&ip4(6), json!({"allowed_addresses": ["10.9.0.100", "10.9.0.128/28"]}));
    assert!(allowed.anti_spoof);
    assert_eq!(json!(allowed.allowed), json!(["10.9.0.100/32", "10.9.0.128/28"]));
}

#[test]
fn create_vm_leaves_checksums_to_the_host_only_with_offload() {
    let fast = json!({"subnet": "10.8.0.0/24", "offload": true, "bridge": "bosh-fast0"});
    let Some(host) = host(json!({"networks": {"default": {}, "fast": fast}})) else { return };
    let stemcell = host.stemcell();
    let on_fast = json!({
        "type": "manual", "ip": "10.8.0.6", "netmask": "255.255.255.0", "gateway": "10.8.0.1",
        "cloud_properties": {"name": "fast"},
    });
    for (network, properties, has_header) in [
        (ip4(6), json!({}), false),
        (ip4(7), json!({"cpu": 2}), false),
        (ip4(8), json!({"anti_spoof": false}), true),
        (on_fast, json!({}), true),
    ] {
        let vm = create(&host, &stemcell, &json!({"a": network}), &properties);
        let record = host.record(&vm_cid(vm.result()));
        let link = host.namespace().link(record.nics[0].tap().unwrap().0.as_str()).unwrap();
        let settings = &link["linkinfo"]["info_data"];
        assert_eq!(settings["vnet_hdr"], has_header, "{network} {properties}");
    }
}

#[test]
fn create_vm_with_movable_address_in_use_succeeds() {
    let Some(host) = host(json!({"networks": {"lan": {"profile": "bridge", "bridge": "br0"}}}))
    else {
        return;
    };
    let (stemcell, outside) = (host.stemcell(), Namespace::new().unwrap());
    host.bridge("br0");
    host.namespace().cable("uplink", &outside, "eth0");
    host.namespace().ip("link set uplink master br0");
    outside.ip("address add 10.7.0.5/24 dev eth0");
    let ask = |last: u8, allowed: &[&str]| {
        let network = json!({
            "type": "manual", "ip": format!("10.7.0.{last}"), "netmask": "255.255.255.0",
            "cloud_properties": {"name": "lan"},
        });
        create(&host, &stemcell, &json!({"a": network}), &json!({"allowed_addresses": allowed}))
    };
    assert!(ask(5, &[]).failure().message.contains("is held by another machine"));
    // A machine with a virtual router's MAC shares its address with other routers.
    outside.ip("link set eth0 address 00:00:5e:00:01:07");
    let vm = vm_cid(ask(5, &[]).result());
    host.ok("delete_vm", &json!([vm]));
    outside.ip("link set eth0 address 02:00:00:00:00:07");
    assert!(ask(5, &[]).failure().message.contains("is held by another machine"));
    // An address that another VM is allowed to use is no conflict.
    assert!(ask(6, &["10.7.0.4/31"]).outcome.is_ok());
    assert!(ask(5, &[]).outcome.is_ok());
}
