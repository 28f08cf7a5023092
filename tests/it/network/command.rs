//! `network plan`, `apply` and `remove`, and networks as calls make them, with the built program.

use bosh_qemu_cpi::store::record::Wire;
use nix::libc;
use serde_json::{Value, json};

use crate::support::host::{Host, command_line, eventually, json_options, vm_cid};
use crate::support::nftables;

/// Output of `network <words>`, and whether it succeeded.
fn network(host: &Host, words: &str) -> (Value, bool) {
    let output = host.namespace().run(|| {
        let mut command = host.cpi();
        command.arg("network").args(words.split_whitespace()).arg("--json");
        command.output().unwrap()
    });
    let stderr = String::from_utf8_lossy(&output.stderr);
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{stderr}"));
    (report["networks"].clone(), output.status.success())
}

/// Changes of all networks in a report.
fn changes(report: &Value) -> Vec<&str> {
    let networks = report.as_array().unwrap().iter();
    networks
        .flat_map(|network| network["changes"].as_array().unwrap())
        .map(|change| change.as_str().unwrap())
        .collect()
}

fn links(host: &Host) -> Vec<String> {
    let links = host.namespace().ip_json("link show");
    links
        .as_array()
        .unwrap()
        .iter()
        .map(|link| link["ifname"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn plan_lists_what_apply_does_and_remove_undoes() {
    let networks = json!({
        "default": {"subnet": "10.9.0.0/24"},
        "lan": {"profile": "bridge", "bridge": "br0"},
        "lab": {"profile": "routed", "subnet": "10.8.0.0/24"},
        "closed": {"profile": "isolated", "subnet": "10.7.0.0/24"},
        "tags": {"profile": "vlan", "uplink": "eth0"},
        "own": {"profile": "user", "subnet": "10.6.0.0/24"},
    });
    let Some(host) = Host::with(json!({"networks": networks})) else { return };
    host.bridge("br0");
    let before = links(&host);
    let (planned, well) = network(&host, "plan");
    assert!(well);
    assert_eq!(links(&host), before, "a plan changes nothing");
    let names: Vec<_> = planned
        .as_array()
        .unwrap()
        .iter()
        .map(|network| network["network"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["closed", "default", "lab", "lan"]);
    assert!(changes(&planned).contains(&"ip address add 10.9.0.1/24 dev bosh-nat0"), "{planned:#}");

    let (applied, well) = network(&host, "apply");
    assert!(well, "{applied:#}");
    assert_eq!(changes(&applied), changes(&planned));
    assert_eq!(applied[1]["state"], "kept without VMs");
    assert_eq!(applied[3]["state"], "managed by the operator");
    let generation = host.namespace().run(nftables::generation);
    for words in ["plan", "apply"] {
        assert_eq!(changes(&network(&host, words).0), [""; 0], "{words} after apply");
    }
    assert_eq!(host.namespace().run(nftables::generation), generation);

    // It stays without VMs, and `apply` restores what was removed.
    let vm = host.vm(&host.stemcell());
    host.ok("delete_vm", &json!([vm]));
    assert_eq!(changes(&network(&host, "plan").0), [""; 0], "after the last VM");
    host.namespace().ip("link delete bosh-nat0");
    host.namespace().run(nftables::flush);
    assert_ne!(changes(&network(&host, "plan").0), [""; 0]);
    assert!(network(&host, "apply").1);
    assert_eq!(changes(&network(&host, "plan").0), [""; 0]);

    assert_eq!(network(&host, "remove lab").0[0]["state"], "removed");
    assert!(host.namespace().link("bosh-routed0").is_none());
    let (removed, well) = network(&host, "remove");
    assert!(well);
    assert_eq!(removed[3]["state"], "managed by the operator");
    assert_eq!(links(&host), before);
    assert_eq!(host.namespace().run(nftables::tables), [""; 0]);
}

#[test]
fn remove_network_with_vms_waits_for_the_last() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    assert!(network(&host, "apply default").1);
    let vm = host.vm(&stemcell);
    assert_eq!(network(&host, "remove").0[0]["state"], "in use, removed with its last VM");
    assert!(host.namespace().link("bosh-nat0").is_some());
    host.ok("delete_vm", &json!([vm]));
    assert!(host.namespace().link("bosh-nat0").is_none());
}

#[test]
fn reboot_vm_keeps_host_services_of_other_vms() {
    let Some(host) = Host::with(json!({"networks": {"default": {"host_services": ["tcp/22"]}}}))
    else {
        return;
    };
    let stemcell = host.stemcell();
    let first = host.vm(&stemcell);
    host.reconfigure(|config| config["networks"]["default"]["host_services"] = json!(["tcp/80"]));
    let second = host.vm(&stemcell);
    for vm in [&first, &second, &first] {
        let rules = host.namespace().run(nftables::generation);
        host.ok("reboot_vm", &json!([vm]));
        assert_eq!(
            host.namespace().run(nftables::generation),
            rules,
            "both ports are open before and after"
        );
    }
    assert_eq!(changes(&network(&host, "plan").0), [""; 0]);
}

#[test]
fn change_profile_of_bridge_with_vms_is_refused() {
    let Some(host) = Host::with(json!({"networks": {"default": {"bridge": "lab0"}}})) else {
        return;
    };
    let stemcell = host.stemcell();
    let vm = host.vm(&stemcell);
    host.reconfigure(|config| {
        config["networks"] = json!({
            "default": {"profile": "routed", "bridge": "lab0"},
            "other": {"subnet": "10.8.0.0/24"},
        });
    });
    let refused = host.call("create_vm", &host.vm_arguments(&stemcell));
    let message = &refused.failure().message;
    assert!(
        message.contains(&format!("VM '{vm}'")) && message.contains("bridge 'lab0' cannot be"),
        "{message}"
    );
    let (planned, well) = network(&host, "plan");
    assert!(!well);
    assert!(
        planned[0]["error"].as_str().unwrap().contains("bridge 'lab0' cannot be"),
        "{planned:#}"
    );
    assert!(
        planned[1]["error"].is_null() && !planned[1]["changes"].as_array().unwrap().is_empty(),
        "{planned:#}"
    );
    host.ok("reboot_vm", &json!([vm]));
    host.reconfigure(|config| config["networks"] = json!({"default": {"bridge": "lab0"}}));
    assert_eq!(changes(&network(&host, "plan").0), [""; 0], "the first VM's rules stay");
}

#[test]
fn create_vm_after_deleted_bridge_restores_it_with_its_taps() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let first = host.vm(&stemcell);
    host.namespace().ip("link delete bosh-nat0");
    host.namespace().run(nftables::flush);
    host.vm(&stemcell);
    let tap = host.record(&first).nics[0].tap().unwrap().0.to_string();
    assert_eq!(host.namespace().link(&tap).unwrap()["master"], "bosh-nat0");
    assert_eq!(changes(&network(&host, "plan").0), [""; 0]);
}

#[test]
fn apply_after_flush_restores_rules_of_running_vms() {
    let Some(host) = Host::new() else { return };
    host.vm(&host.stemcell());
    let tables = || {
        let mut tables = host.namespace().run(nftables::tables);
        tables.sort();
        tables
    };
    let before = tables();
    assert!(before.iter().any(|table| table == "bosh-qemu-guard"), "{before:?}");
    host.namespace().run(nftables::flush);
    let lost = network(&host, "plan").0;
    assert_eq!(changes(&lost)[0], "nft tables 'bosh-qemu-guard' for all VMs");
    assert!(network(&host, "apply").1);
    assert_eq!(tables(), before);
    assert_eq!(changes(&network(&host, "plan").0), [""; 0]);
    network(&host, "remove");
}

#[test]
fn create_vms_concurrently_makes_one_network() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let arguments: Vec<_> = (0..3).map(|_| host.vm_arguments(&stemcell)).collect();
    let calls: Vec<_> =
        arguments.iter().map(|arguments| host.start("create_vm", arguments)).collect();
    for call in calls {
        let output = call.wait_with_output().unwrap();
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(answer["error"].is_null(), "{answer}");
    }
    assert_eq!(changes(&network(&host, "plan").0), [""; 0]);
}

#[test]
fn plan_with_foreign_drop_rules_names_the_remedy() {
    let Some(host) = Host::with(json!({"networks": {"default": {"host_services": ["tcp/22"]}}}))
    else {
        return;
    };
    host.namespace()
        .run(|| nftables::drop_at(libc::NF_INET_FORWARD, "filter", "FORWARD", &["DOCKER-USER"]));
    host.namespace().run(|| nftables::drop_at(libc::NF_INET_LOCAL_IN, "mine", "closed", &[]));
    let answer = host.call("create_vm", &host.vm_arguments(&host.stemcell()));
    vm_cid(answer.result());
    let warned = "Docker drops forwarded packets, also those of VMs on bridge 'bosh-nat0'";
    assert!(answer.stderr.contains(warned), "{}", answer.stderr);
    assert!(
        answer.stderr.contains("iptables -I DOCKER-USER -i bosh-nat0 -j ACCEPT"),
        "{}",
        answer.stderr
    );
    let (planned, _) = network(&host, "plan");
    let causes: Vec<_> =
        planned[0]["findings"].as_array().unwrap().iter().map(|found| &found["cause"]).collect();
    let closed = "chain 'closed' of table 'ip mine' drops packets to this host, also to \
                  host_services, from VMs on bridge 'bosh-nat0'";
    assert!(causes.contains(&&json!(warned)) && causes.contains(&&json!(closed)), "{causes:?}");
    assert!(causes.iter().all(|cause| {
        !cause.as_str().unwrap().contains("'closed' of table 'ip mine' drops forwarded packets")
    }));
    host.delete_everything();
    host.namespace().run(nftables::flush);
}

#[test]
fn plan_conflicting_networks_is_refused() {
    let networks = json!({"one": {}, "two": {"profile": "routed", "bridge": "bosh-nat0"}});
    let Some(host) = Host::with(json!({"networks": networks})) else { return };
    let both = "bridge 'bosh-nat0' cannot be what both network 'one' and network 'two' need";
    let (planned, well) = network(&host, "plan");
    assert!(!well && planned[0]["error"].as_str().unwrap().starts_with(both), "{planned:#}");
    host.reconfigure(|config| config["networks"]["two"] = json!({}));
    let output =
        host.namespace().run(|| host.cpi().args(["network", "plan", "three"]).output().unwrap());
    assert!(!output.status.success());
    let refused = String::from_utf8(output.stderr).unwrap();
    assert!(refused.starts_with("Error: this host has no network 'three'"), "{refused}");
}

#[test]
fn create_vm_passes_queues_and_mtu_to_the_guest() {
    let Some(host) = Host::with(json!({"networks": {"default": {"mtu": 1400}}})) else { return };
    let mut arguments = host.vm_arguments(&host.stemcell());
    arguments[2]["cpu"] = json!(3);
    let vm = vm_cid(&host.ok("create_vm", &arguments));
    let words = command_line(&host.qemu(&vm).unwrap());
    let devices = json_options(&words, "-device");
    let nic = devices.iter().find(|device| device["driver"] == "virtio-net-pci").unwrap();
    assert_eq!(
        (&nic["mq"], &nic["vectors"], &nic["host_mtu"]),
        (&json!(true), &json!(8), &json!(1400))
    );
    let netdev = &json_options(&words, "-netdev")[0];
    assert_eq!(netdev["fds"].as_str().unwrap().split(':').count(), 3);
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    assert!(network(&host, "plan").1);
}

#[test]
fn create_vm_with_user_network_makes_no_link() {
    let networks = json!({"default": {"profile": "user", "subnet": "10.9.0.0/24"}});
    let Some(host) = Host::with(json!({"networks": networks})) else { return };
    let before = links(&host);
    let vm = host.booted_vm();
    assert_eq!(links(&host), before);
    let nic = &host.record(&vm).nics[0];
    assert!(
        matches!(&nic.wire, Wire::User { user } if user.gateway.to_string() == "10.9.0.1/24"),
        "{nic:?}"
    );
    let qemu = host.qemu(&vm).unwrap();
    let netdev = &json_options(&command_line(&qemu), "-netdev")[0];
    assert_eq!(
        (&netdev["type"], &netdev["net"], &netdev["host"]),
        (&json!("user"), &json!("10.9.0.0/24"), &json!("10.9.0.1"))
    );
    let supervisor = host.supervisor(&vm).unwrap();
    let namespace = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_eq!(
        namespace(qemu.pid()),
        namespace(supervisor.pid()),
        "its packets are sent by this process"
    );
    host.ok("reboot_vm", &json!([vm]));
    eventually("a second boot", || host.qemu(&vm));
}
