//! Addresses and host ports of VMs: allocation, conflicts and release.

use std::time::{Duration, Instant};

use bosh_qemu_cpi::store::record::Wire;
use serde_json::{Value, json};

use crate::support::answer::Answer;
use crate::support::host::{Host, command_line, json_options, text, vm_cid};
use crate::support::netns::Namespace;

const POOL: &str = "10.7.0.10-10.7.0.11";

fn host() -> Option<Host> {
    let group = json!([{"protocol": "tcp", "ports": "80"}]);
    let network = json!({"subnet": "10.7.0.0/24", "pool": POOL});
    Host::with(json!({"networks": {"default": network}, "security_groups": {"web": group}}))
}

fn create(host: &Host, stemcell: &str, networks: &Value, properties: &Value) -> Answer {
    let mut properties = properties.clone();
    properties["ram"] = json!(64);
    host.call("create_vm", &json!(["agent-1", stemcell, properties, networks, [], {}]))
}

fn manual(ip: &str) -> Value {
    json!({"a": {
        "type": "manual", "ip": ip, "netmask": "255.255.255.0", "gateway": "10.7.0.1",
        "default": ["gateway"],
    }})
}

fn dynamic() -> Value {
    json!({"a": {"type": "dynamic"}})
}

#[test]
fn create_vm_with_dynamic_network_takes_a_pool_address() {
    let Some(host) = host() else { return };
    let stemcell = host.stemcell();
    let made = |networks: &Value| create(&host, &stemcell, networks, &json!({})).result().clone();
    let (one, two) = (made(&dynamic()), made(&dynamic()));
    assert_eq!(
        (&one[1]["a"]["ip"], &two[1]["a"]["ip"]),
        (&json!("10.7.0.10"), &json!("10.7.0.11"))
    );
    assert_eq!(one[1]["a"]["type"], "dynamic");
    assert_eq!(
        (&one[1]["a"]["netmask"], &one[1]["a"]["gateway"]),
        (&json!("255.255.255.0"), &json!("10.7.0.1"))
    );
    let settings = std::fs::read(host.paths(&vm_cid(&one)).config_drive()).unwrap();
    let settings = String::from_utf8_lossy(&settings);
    assert!(settings.contains(r#""type":"manual""#) && settings.contains(r#""ip":"10.7.0.10""#));

    let full = create(&host, &stemcell, &dynamic(), &json!({}));
    assert_eq!(full.failure().kind, "VMCreationFailed", "{full:?}");
    assert!(full.failure().message.contains("no free address"), "{full:?}");
    host.ok("delete_vm", &json!([vm_cid(&one)]));
    // The previous address of the instance is given again if it is free.
    let again = json!({"a": {"type": "dynamic", "ip": "10.7.0.10"}});
    assert_eq!(made(&again)[1]["a"]["ip"], "10.7.0.10");
}

#[test]
fn create_vms_with_one_address_concurrently_succeeds_once() {
    let Some(host) = host() else { return };
    let stemcell = host.stemcell();
    let answers: Vec<Answer> = std::thread::scope(|threads| {
        let calls: Vec<_> = (0..3)
            .map(|_| threads.spawn(|| create(&host, &stemcell, &manual("10.7.0.5"), &json!({}))))
            .collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    });
    let (made, refused): (Vec<_>, Vec<_>) =
        answers.iter().partition(|answer| answer.outcome.is_ok());
    assert_eq!((made.len(), refused.len()), (1, 2), "{answers:?}");
    let holder = text(&made[0].result()[0]);
    for answer in refused {
        assert_eq!(answer.failure().kind, "VMCreationFailed");
        let expected = format!("network 'a': 10.7.0.5 is reserved by VM '{holder}'");
        assert!(answer.failure().message.contains(&expected), "{answer:?}");
    }
    host.ok("delete_vm", &json!([holder]));
    assert!(create(&host, &stemcell, &manual("10.7.0.5"), &json!({})).outcome.is_ok());
}

#[test]
fn forward_port_of_another_vm_is_refused() {
    let Some(host) = host() else { return };
    let stemcell = host.stemcell();
    let ports =
        json!({"ports": [{"host": "8080-8082", "guest": "80-82"}], "security_groups": ["web"]});
    let one = create(&host, &stemcell, &manual("10.7.0.5"), &ports);
    let holder = text(&one.result()[0]);
    let clash = json!({"ports": [{"host": 8081, "guest": 80, "address": "192.0.2.1"}]});
    let refused = create(&host, &stemcell, &manual("10.7.0.6"), &clash);
    let expected = format!("port tcp/8081 of this host is reserved by VM '{holder}'");
    assert!(refused.failure().message.contains(&expected), "{refused:?}");
    // The same port of another protocol is free.
    let udp = json!({"ports": [{"host": 8081, "guest": 80, "protocol": "udp"}]});
    assert!(create(&host, &stemcell, &manual("10.7.0.6"), &udp).outcome.is_ok());
    let unknown =
        create(&host, &stemcell, &manual("10.7.0.7"), &json!({"security_groups": ["wbe"]}));
    assert!(unknown.failure().message.contains("the configuration has: web"), "{unknown:?}");
}

/// A refusal waits for nothing. The limit is far below the time that a launch may take to be
/// undone, and far above what a call takes on a busy machine.
const REFUSAL_LIMIT: Duration = Duration::from_secs(10);

#[test]
fn create_vm_that_conflicts_after_its_first_reservation_is_refused_at_once() {
    let Some(host) = host() else { return };
    let stemcell = host.stemcell();
    let ports = json!({"ports": [{"host": 8080, "guest": 80}]});
    let holder = vm_cid(create(&host, &stemcell, &manual("10.7.0.10"), &ports).result());
    let before = host.leaks();
    let mut second = manual("10.7.0.6");
    second["a"]["cloud_properties"] = json!({"name": "default"});
    second["b"] = manual("10.7.0.10")["a"].clone();
    second["b"]["default"] = json!([]);
    let two = json!({"ports": [{"host": 8079, "guest": 79}, {"host": 8080, "guest": 80}]});
    for (networks, properties, what) in [
        (manual("10.7.0.6"), ports, "port tcp/8080 of this host"),
        (manual("10.7.0.6"), two, "port tcp/8080 of this host"),
        (second, json!({}), "network 'b': 10.7.0.10"),
    ] {
        let began = Instant::now();
        let refused = create(&host, &stemcell, &networks, &properties);
        assert!(began.elapsed() < REFUSAL_LIMIT, "{:?}: {refused:?}", began.elapsed());
        let expected = format!("{what} is reserved by VM '{holder}'");
        assert!(refused.failure().message.contains(&expected), "{refused:?}");
        assert_eq!(host.leaks(), before);
    }
}

#[test]
fn create_vm_with_ports_that_overlap_is_refused_by_its_entries() {
    let Some(host) = host() else { return };
    let stemcell = host.stemcell();
    let ask =
        |ports: Value| create(&host, &stemcell, &manual("10.7.0.5"), &json!({"ports": ports}));
    for second in [
        json!({"host": 8081}),
        json!({"host": "8079-8080"}),
        json!({"host": 8082, "guest": 1, "address": "192.0.2.1"}),
    ] {
        let refused = ask(json!([{"host": "8080-8082"}, second]));
        let message = &refused.failure().message;
        assert!(message.contains("ports: entries 0 and 1 both forward port tcp/80"), "{message}");
    }
    let made = ask(json!([
        {"host": 8080, "address": "192.0.2.1"}, {"host": 8080, "address": "192.0.2.2"},
        {"host": 8080, "protocol": "udp"},
    ]));
    assert!(made.outcome.is_ok(), "{made:?}");
}

#[test]
fn create_vm_chooses_no_address_that_another_of_its_networks_gives() {
    let Some(host) = host() else { return };
    let mut networks = dynamic();
    networks["b"] = manual("10.7.0.10")["a"].clone();
    let made = create(&host, &host.stemcell(), &networks, &json!({}));
    assert_eq!(made.result()[1]["a"]["ip"], "10.7.0.11");
}

#[test]
fn forward_port_of_missing_address_warns_until_it_exists() {
    let Some(host) = host() else { return };
    let stemcell = host.stemcell();
    let ports = |address: &str| json!({"ports": [{"host": 8080, "guest": 80, "address": address}]});
    let made = create(&host, &stemcell, &manual("10.7.0.5"), &ports("192.0.2.9"));
    vm_cid(made.result());
    let cause =
        "port tcp/8080 of 192.0.2.9 leads to 10.7.0.5, but no link of this host has 192.0.2.9";
    assert!(
        made.stderr.contains(cause) && made.stderr.contains("ip address add 192.0.2.9 dev LINK"),
        "{}",
        made.stderr
    );
    let causes = || -> Vec<Value> {
        let (_, planned) = host.command(&["network", "plan", "--json"]);
        let findings = planned["networks"][0]["findings"].as_array().unwrap();
        findings.iter().map(|finding| finding["cause"].clone()).collect()
    };
    assert_eq!(causes(), [json!(cause)]);
    host.namespace().ip("address add 192.0.2.9/32 dev lo");
    assert_eq!(causes(), [""; 0]);
    let accepted = create(
        &host,
        &stemcell,
        &manual("10.7.0.6"),
        &json!({"ports": [{"host": 81, "address": "192.0.2.9"}]}),
    );
    assert!(
        accepted.outcome.is_ok() && !accepted.stderr.contains("no link of this host"),
        "{}",
        accepted.stderr
    );
    // No packet from outside arrives at these addresses.
    for (address, problem) in [
        ("127.0.0.1", "no network that this host forwards ports to"),
        ("::1", "no network that this host forwards ports to"),
        ("0.0.0.0", "not an address of a host"),
    ] {
        let refused = create(&host, &stemcell, &manual("10.7.0.7"), &ports(address));
        assert!(refused.failure().message.contains(problem), "{refused:?}");
    }
}

#[test]
fn create_vm_with_security_group_resolves_its_protocols() {
    let Some(host) = host() else { return };
    host.reconfigure(|config| {
        config["security_groups"] = json!({"router": [
            {"protocol": "vrrp", "source": "10.7.0.0/24"}, {"protocol": 89, "source": "fd00::/64"},
            {"protocol": "sctp", "ports": "3868", "source": "10.0.0.0/8"}, {"protocol": "icmp"},
        ]});
    });
    let made = create(
        &host,
        &host.stemcell(),
        &manual("10.7.0.5"),
        &json!({"security_groups": ["router"]}),
    );
    let record = host.record(&vm_cid(made.result()));
    let admits = record.nics[0].rules.as_ref().unwrap().admits.as_ref().unwrap();
    assert_eq!(
        json!(admits),
        json!([
            {"source": "10.7.0.0/24", "protocols": [112, 112]},
            {"source": "fd00::/64", "protocols": [89, 89]},
            {"source": "10.0.0.0/8", "protocols": [132, 132], "ports": [3868, 3868]},
            {"source": "0.0.0.0/0", "protocols": [1, 1]},
            {"source": "::/0", "protocols": [58, 58]},
        ])
    );
}

#[test]
fn create_vm_with_duplicate_or_gateway_address_is_refused() {
    let Some(host) = host() else { return };
    let stemcell = host.stemcell();
    for allowed in ["0.0.0.0/0", "10.7.0.0/29", "10.7.0.1"] {
        let refused =
            create(&host, &stemcell, &manual("10.7.0.5"), &json!({"allowed_addresses": [allowed]}));
        assert!(
            refused.failure().message.contains("contains the gateway of network"),
            "{refused:?}"
        );
    }
    let mut twice = manual("10.7.0.5");
    let (name, network) =
        twice.as_object().unwrap().iter().next().map(|(n, v)| (n.clone(), v.clone())).unwrap();
    twice["other"] = network;
    let refused = create(&host, &stemcell, &twice, &json!({}));
    let message = &refused.failure().message;
    assert!(
        message.contains(&format!("networks '{name}' and 'other' have the same ip")),
        "{message}"
    );
}

#[test]
fn create_vm_with_address_in_use_outside_is_refused() {
    let Some(host) =
        Host::with(json!({"networks": {"lan": {"profile": "bridge", "bridge": "br0"}}}))
    else {
        return;
    };
    let (stemcell, outside) = (host.stemcell(), Namespace::new().unwrap());
    host.bridge("br0");
    host.namespace().cable("uplink", &outside, "eth0");
    host.namespace().ip("link set uplink master br0");
    outside.ip("address add 10.7.0.5/24 dev eth0");
    outside.ip("address add fd00:7::5/64 dev eth0 nodad");
    let ask = |ip: &str, netmask: &str| {
        let network = json!({
            "type": "manual", "ip": ip, "netmask": netmask, "cloud_properties": {"name": "lan"},
        });
        create(&host, &stemcell, &json!({"a": network}), &json!({}))
    };
    for (ip, netmask) in [("10.7.0.5", "255.255.255.0"), ("fd00:7::5", "ffff:ffff:ffff:ffff::")] {
        let refused = ask(ip, netmask);
        let message = &refused.failure().message;
        assert!(
            message.contains(&format!("network 'a': {ip} is held by another machine")),
            "{message}"
        );
        assert!(message.contains("conflict_probe"), "{message}");
    }
    assert!(ask("10.7.0.6", "255.255.255.0").outcome.is_ok());
    host.reconfigure(|config| config["networks"]["lan"]["conflict_probe"] = json!(false));
    assert!(ask("10.7.0.5", "255.255.255.0").outcome.is_ok());
}

#[test]
fn create_vm_with_dynamic_user_network_gets_an_address() {
    let networks = json!({
        "default": {"profile": "user"},
        "own": {"profile": "user", "subnet": "10.6.0.0/24", "pool": "10.6.0.1-10.6.0.9"},
    });
    let Some(host) = Host::with(json!({"networks": networks})) else { return };
    let stemcell = host.stemcell();
    let own = json!({"type": "dynamic", "cloud_properties": {"name": "own"}});
    let both = json!({"a": {"type": "dynamic", "default": ["gateway"]}, "b": own});
    let ports = json!({"ports": [{"host": 8080, "guest": 80, "address": "127.0.0.1"}]});
    let made = create(&host, &stemcell, &both, &ports).result().clone();
    let network = |name: &str| {
        let network = &made[1][name];
        json!([network["type"], network["ip"], network["netmask"], network["gateway"]])
    };
    assert_eq!(network("a"), json!(["dynamic", "10.0.2.15", "255.255.255.0", "10.0.2.2"]));
    assert_eq!(network("b"), json!(["dynamic", "10.6.0.2", "255.255.255.0", "10.6.0.1"]));
    let vm = vm_cid(&made);
    let settings = std::fs::read(host.paths(&vm).config_drive()).unwrap();
    let settings = String::from_utf8_lossy(&settings);
    assert!(settings.contains(r#""type":"manual""#) && settings.contains(r#""ip":"10.0.2.15""#));
    assert!(!settings.contains(r#""type":"dynamic""#), "no DHCP server answers");
    let guests = host.record(&vm).nics.into_iter().map(|nic| match nic.wire {
        Wire::User { user } => user.guest.to_string(),
        Wire::Tap { .. } => panic!("a tap"),
    });
    assert_eq!(guests.collect::<Vec<_>>(), ["10.0.2.15", "10.6.0.2"], "the addresses are recorded");
    let netdev = &json_options(&command_line(&host.qemu(&vm).unwrap()), "-netdev")[0];
    assert_eq!(netdev["hostfwd"], json!([{"str": "tcp:127.0.0.1:8080-10.0.2.15:80"}]));

    // Each VM has a user network of its own, so addresses repeat.
    let again = create(&host, &stemcell, &json!({"a": {"type": "dynamic"}}), &json!({}));
    assert_eq!(again.result()[1]["a"]["ip"], "10.0.2.15");
    let twice = create(
        &host,
        &stemcell,
        &json!({"a": {"type": "dynamic"}, "b": {"type": "dynamic"}}),
        &json!({}),
    );
    assert!(twice.failure().message.contains("networks 'a' and 'b' have the same ip"), "{twice:?}");
    for (pool, problem) in [
        ("10.5.0.1-10.5.0.9", "a pool that is not in its subnet"),
        ("10.6.0.1-10.6.0.1", "without an address for a VM"),
    ] {
        host.reconfigure(|config| config["networks"]["own"]["pool"] = json!(pool));
        let refused = create(&host, &stemcell, &json!({"a": own}), &json!({}));
        assert!(refused.failure().message.contains(problem), "{refused:?}");
    }
}
