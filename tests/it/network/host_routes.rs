//! Requests cannot take addresses or routes that the host already uses.

use serde_json::{Value, json};

use crate::support::host::{Host, vm_cid};

/// A host with a link to the world and without a configured subnet.
fn host(networks: &Value) -> Option<Host> {
    let host = Host::with(json!({"networks": networks}))?;
    host.bridge("uplink");
    host.namespace().ip("address add 192.0.2.1/24 dev uplink");
    host.namespace().ip("route add default via 192.0.2.254");
    Some(host)
}

/// Error of a create_vm on the subnet of `gateway`; `None` if it succeeds.
fn refusal(host: &Host, stemcell: &str, gateway: &str, netmask: &str) -> Option<String> {
    let v6 = gateway.contains(':');
    let ip = if v6 {
        format!("{gateway}5")
    } else {
        format!("{}.5", &gateway[..gateway.rfind('.').unwrap()])
    };
    let network = json!({"type": "manual", "ip": ip, "netmask": netmask, "gateway": gateway});
    let answer =
        host.call("create_vm", &json!(["agent-1", stemcell, {"ram": 64}, {"a": network}, [], {}]));
    match answer.outcome {
        Ok(made) => {
            host.ok("delete_vm", &json!([vm_cid(&made)]));
            None
        }
        Err(failure) => Some(failure.message),
    }
}

#[test]
fn create_vm_over_host_route_is_refused() {
    let Some(host) = host(&json!({"default": {}})) else { return };
    let stemcell = host.stemcell();
    let routes = [
        "route add 172.16.0.0/16 via 192.0.2.9",
        "route add blackhole 10.5.0.0/16",
        "route add 10.6.0.0/24 via 192.0.2.9 table 52",
        "route add 10.7.0.0/24 nexthop via 192.0.2.8 nexthop via 192.0.2.9",
    ];
    routes.iter().for_each(|route| drop(host.namespace().ip(route)));
    let before = host.namespace().ip("route show table all") + &host.namespace().ip("link show");
    for (gateway, netmask, holder) in [
        ("172.16.9.1", "255.255.255.0", "the route of 172.16.0.0/16 to 'uplink'"),
        ("10.5.1.1", "255.255.255.0", "the route of 10.5.0.0/16 to no link"),
        ("10.6.0.1", "255.255.255.0", "the route of 10.6.0.0/24 to 'uplink'"),
        ("10.7.0.1", "255.255.255.0", "the route of 10.7.0.0/24 to 'uplink'"),
        ("192.0.2.4", "255.255.255.248", "this host's address 192.0.2.1/24 on 'uplink'"),
    ] {
        let refused = refusal(&host, &stemcell, gateway, netmask)
            .unwrap_or_else(|| panic!("{gateway} was given"));
        assert!(
            refused.contains(&format!("for network 'default', which overlaps with {holder}")),
            "{refused}"
        );
        assert!(refused.contains("networks.default.subnet"), "{refused}");
    }
    for gateway in ["8.8.8.1", "169.254.169.1"] {
        let refused = refusal(&host, &stemcell, gateway, "255.255.255.0").expect("the world's");
        assert!(refused.contains("it is no private subnet"), "{refused}");
    }
    assert_eq!(
        host.namespace().ip("route show table all") + &host.namespace().ip("link show"),
        before
    );
    // A route to half of the address space is the default route of a VPN and no conflict.
    host.namespace().ip("route add 0.0.0.0/1 via 192.0.2.9");
    let vm = host.vm(&stemcell);
    let (_, planned) = host.command(&["network", "plan", "--json"]);
    assert_eq!(planned["networks"][0]["findings"], json!([]));
    host.ok("delete_vm", &json!([vm]));
    // A subnet in the operator's configuration is accepted.
    host.reconfigure(|config| config["networks"]["default"]["subnet"] = json!("172.16.9.0/24"));
    assert_eq!(refusal(&host, &stemcell, "172.16.9.1", "255.255.255.0"), None);
}

#[test]
fn create_second_vm_on_same_subnet_succeeds() {
    let Some(host) = host(&json!({"default": {}})) else { return };
    let stemcell = host.stemcell();
    // The first VM has given the subnet and its route to the bridge.
    host.vm(&stemcell);
    host.vm(&stemcell);
}

#[test]
fn create_network_over_host_route_is_refused() {
    let Some(host) = host(&json!({"default": {}})) else { return };
    host.reconfigure(|config| config["managed_range"] = json!("10.8.0.0/23"));
    host.namespace().ip("route add 10.8.0.0/24 via 192.0.2.9");
    let ask = |subnet: Value| host.call("create_network", &json!([subnet]));
    let refused = ask(json!({"range": "10.8.0.0/25", "cloud_properties": {}}));
    assert!(
        refused.failure().message.contains("the route of 10.8.0.0/24 to 'uplink'"),
        "{refused:?}"
    );
    let refused = ask(json!({"range": "8.8.8.0/24", "cloud_properties": {}}));
    assert!(
        refused.failure().message.contains("neither private nor in this host's managed_range"),
        "{refused:?}"
    );
    let chosen = ask(json!({"netmask_bits": 24, "cloud_properties": {}})).result().clone();
    assert_eq!(chosen[1]["range"], "10.8.1.0/24", "the first that is free");
    host.ok("delete_network", &json!([chosen[0]]));
    host.reconfigure(|config| config["managed_range"] = json!("8.8.8.0/23"));
    let own = ask(json!({"range": "8.8.8.0/24", "cloud_properties": {}})).result().clone();
    host.ok("delete_network", &json!([own[0]]));
}
