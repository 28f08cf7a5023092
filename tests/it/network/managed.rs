//! create_network, delete_network and VMs on such networks, as the Director uses them for `managed:
//! true`.

use std::collections::BTreeSet;

use bosh_qemu_cpi::store::record::NetworkRecord;
use serde_json::{Value, json};

use crate::support::answer::Answer;
use crate::support::crash_points::call_with_crash;
use crate::support::host::{Host, request, text};
use crate::support::skip;

#[test]
fn create_use_and_delete_network_succeed() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let subnet = json!([{
        "type": "manual", "range": "10.9.0.0/24", "gateway": "10.9.0.1", "cloud_properties": {},
    }]);
    let made = host.ok("create_network", &subnet);
    let network = text(&made[0]);
    assert_eq!(made[1], json!({"range": "10.9.0.0/24", "gateway": "10.9.0.1", "reserved": []}));
    let links = || host.namespace().ip("-4 -brief address show");
    assert!(links().contains("10.9.0.1/24"), "{}", links());

    let overlapping = host.call("create_network", &subnet);
    assert!(
        overlapping.failure().message.contains(&format!("managed network '{network}'")),
        "{overlapping:?}"
    );

    let networks = json!({"a": {
        "type": "manual", "ip": "10.9.0.5", "netmask": "255.255.255.0", "gateway": "10.9.0.1",
        "cloud_properties": made[2], "default": ["gateway"],
    }});
    let vm = host.ok("create_vm", &json!(["agent-1", stemcell, {"ram": 64}, networks, [], {}]));
    let vm = text(&vm[0]);
    let used = host.call("delete_network", &json!([network]));
    assert!(used.failure().message.contains(&format!("is used by VM '{vm}'")), "{used:?}");
    host.ok("delete_vm", &json!([vm]));
    assert!(links().contains("10.9.0.1/24"), "the bridge stays without VMs");

    host.ok("delete_network", &json!([network]));
    assert!(!links().contains("10.9.0.1/24"));
    let gone = host.call("delete_network", &json!([network]));
    assert_eq!(gone.failure().kind, "NetworkNotFound", "{gone:?}");
    let lost = host.call("create_vm", &json!(["agent-1", stemcell, {"ram": 64}, networks, [], {}]));
    assert_eq!(lost.failure().kind, "NetworkNotFound", "{lost:?}");
}

#[test]
fn create_network_without_range_picks_a_free_subnet() {
    let Some(host) = Host::with(json!({"managed_range": "10.8.0.0/23"})) else { return };
    // A link of the operator has the first subnet.
    host.bridge("theirs");
    host.namespace().ip("address add 10.8.0.9/24 dev theirs");
    let ask = || {
        host.call(
            "create_network",
            &json!([{"type": "manual", "netmask_bits": 24, "cloud_properties": {}}]),
        )
    };
    let made = ask().result().clone();
    assert_eq!(made[1], json!({"range": "10.8.1.0/24", "gateway": "10.8.1.1", "reserved": []}));
    assert!(ask().failure().message.contains("find a free subnet in 10.8.0.0/23"));
    host.ok("delete_network", &json!([made[0]]));
    let refused = host.call(
        "create_network",
        &json!([{
            "type": "manual", "range": "10.9.0.0/24", "cloud_properties": {"profile": "user"},
        }]),
    );
    assert!(refused.failure().message.contains("cannot have the profile 'user'"), "{refused:?}");
}

#[test]
fn network_remove_keeps_managed_networks() {
    let Some(host) = Host::new() else { return };
    let profiles = host.path("profiles");
    std::fs::create_dir(&profiles).unwrap();
    let routed = concat!(env!("CARGO_MANIFEST_DIR"), "/netconfig/routed.toml");
    std::fs::copy(routed, profiles.join("mine.toml")).unwrap();
    host.reconfigure(|config| config["network_profiles_dir"] = json!(profiles));
    let subnet = json!([{
        "type": "manual", "range": "10.9.0.0/24", "cloud_properties": {"profile": "mine"},
    }]);
    let network = text(&host.ok("create_network", &subnet)[0]);
    let links = || host.namespace().ip("-4 -brief address show");
    host.namespace().run(|| {
        let output = host.cpi().args(["network", "remove"]).output().unwrap();
        let printed = String::from_utf8(output.stdout).unwrap();
        assert!(
            output.status.success() && printed.contains("delete_network removes it"),
            "{printed}"
        );
    });
    assert!(links().contains("10.9.0.1/24"), "{}", links());
    std::fs::remove_file(profiles.join("mine.toml")).unwrap();
    host.ok("delete_network", &json!([network]));
    assert!(!links().contains("10.9.0.1/24"));
}

/// create_network is killed after its last step, before it answers.
#[test]
fn create_network_replaces_an_unacknowledged_network() {
    if !cfg!(debug_assertions) {
        return skip("crash points are for builds with debug assertions");
    }
    let Some(host) = Host::new() else { return };
    let subnet = json!([{"type": "manual", "range": "10.9.0.0/24", "cloud_properties": {}}]);
    let unacknowledged = || {
        assert!(
            call_with_crash(&host, "create_network", &subnet, [("AT", "pending note removed")])
                .is_none()
        );
        host.store().list::<NetworkRecord>().unwrap().pop().unwrap()
    };
    let audit = || host.command(&["audit", "--json"]).1["findings"].as_array().unwrap().clone();
    let network = unacknowledged();
    let found = audit();
    assert_eq!(
        (&found[0]["kind"], &found[0]["what"], found.len()),
        (&json!("unacknowledged"), &json!(network), 1),
        "{found:?}"
    );
    // For another Director the network is taken: only the Director that made it may replace it.
    let other: Value = serde_json::from_str(&request("create_network", &subnet)).unwrap();
    let other = json!({
        "method": other["method"], "arguments": other["arguments"],
        "context": {"director_uuid": "another"},
    });
    let refused = host.ask(&other.to_string());
    assert!(
        refused.failure().message.contains(&format!("managed network '{network}'")),
        "{refused:?}"
    );
    let made = host.ok("create_network", &subnet);
    let networks = || host.store().list::<NetworkRecord>().unwrap();
    assert_eq!(json!(networks()), json!([made[0]]));
    assert_eq!(audit(), Vec::<Value>::new());
    let overlapping = host.call("create_network", &subnet);
    assert!(
        overlapping.failure().message.contains(&format!("managed network '{}'", text(&made[0]))),
        "{overlapping:?}"
    );
    host.ok("delete_network", &json!([made[0]]));

    // A create_vm on the network acknowledges it.
    let network = unacknowledged();
    let mut arguments = host.vm_arguments(&host.stemcell());
    arguments[3]["net"]["cloud_properties"] = json!({"network": network});
    let vm = host.ok("create_vm", &arguments);
    assert_eq!(audit(), Vec::<Value>::new());
    host.ok("delete_vm", &json!([vm[0]]));
    let overlapping = host.call("create_network", &subnet);
    assert!(
        overlapping.failure().message.contains(&format!("managed network '{network}'")),
        "{overlapping:?}"
    );
    host.ok("delete_network", &json!([network]));
}

/// Concurrent calls choose different ranges.
#[test]
fn create_networks_concurrently_get_distinct_ranges() {
    let Some(host) = Host::new() else { return };
    let subnet = json!([{"type": "manual", "netmask_bits": 24, "cloud_properties": {}}]);
    let calls: Vec<_> = (0..8).map(|_| host.start("create_network", &subnet)).collect();
    let answers = calls.into_iter().map(|call| Answer::of(&call.wait_with_output().unwrap()));
    let made: Vec<_> = answers.map(|answer| answer.result().clone()).collect();
    let ranges: BTreeSet<_> = made.iter().map(|network| text(&network[1]["range"])).collect();
    assert_eq!(ranges.len(), made.len(), "{made:?}");
    for network in made {
        host.ok("delete_network", &json!([network[0]]));
    }
}
