//! Every transport returns the answers of a local call.

use serde_json::{Value, json};

use super::Pair;
use crate::support::host::{Host, request};
use crate::support::remote::{Director, SocketUnit};

/// Requests whose answers depend only on the program.
fn requests() -> Vec<String> {
    let mut requests: Vec<_> = [
        ("has_vm", json!(["vm-1"])),
        ("has_disk", json!(["disk-1"])),
        ("delete_vm", json!(["vm-1"])),
        ("delete_stemcell", json!(["stemcell-1"])),
        ("get_disks", json!(["vm-1"])),
        ("attach_disk", json!(["vm-1", "disk-1"])),
        ("resize_disk", json!(["disk-1", 10])),
        ("delete_disk", json!(["disk-1"])),
        ("create_disk", json!([1, {"secret": "x"}])),
        ("create_disk", json!([-1, {}])),
        ("create_vm", json!(["a", "stemcell-1", {"ram": "x"}, {}, [], {}])),
        ("create_vm", json!(["a", "stemcell-1", {}, {}, [], {}])),
        (
            "calculate_vm_cloud_properties",
            json!([{"ram": 512, "cpu": 1, "ephemeral_disk_size": 1024}]),
        ),
        ("delete_network", json!(["net-1"])),
        ("ping", json!([])),
        ("no_such_method", json!([])),
    ]
    .iter()
    .map(|(method, arguments)| request(method, arguments))
    .collect();
    requests.extend(["", "nonsense", "{\"method\":\"has_vm\"}"].map(str::to_owned));
    let context = json!({"agent": {"mbuss": "x"}});
    requests
        .push(json!({"method": "has_vm", "arguments": ["vm-1"], "context": context}).to_string());
    requests
}

/// The lines of a log without times and the caller's address, which differ between runs.
fn comparable(stderr: &str) -> Vec<String> {
    let lines = stderr.lines().filter(|line| !line.contains("called by"));
    lines
        .map(|line| line.split_once(' ').map_or(line, |(_, rest)| rest))
        .map(without_times)
        .collect()
}

fn without_times(line: &str) -> String {
    let words = line.split(' ').filter(|word| !word.starts_with("elapsed_ms="));
    words.collect::<Vec<_>>().join(" ")
}

fn compare(host: &Host, director: &Director) {
    for request in requests() {
        let (here, there) = (host.ask(&request), director.ask(&request));
        assert_eq!(there.stdout, here.stdout, "{request}");
        assert_eq!(comparable(&there.stderr), comparable(&here.stderr), "{request}");
    }
}

#[test]
fn call_through_ssh_answers_like_the_host() {
    let Some(Pair { host, director, sshd: _sshd }) = Pair::new() else { return };
    compare(&host, &director);
}

#[test]
fn call_through_socket_answers_like_the_host() {
    let (Some(host), Some(director)) = (Host::new(), Director::new()) else { return };
    let socket = SocketUnit::start(&director, &host);
    director.configure(&json!({"transport": socket.transport()}));
    compare(&host, &director);
}

#[test]
fn call_with_transport_in_context_uses_it() {
    let Some(Pair { host, director, sshd }) = Pair::new() else { return };
    director.configure(&json!({"transport": {"kind": "unix", "socket": "/nowhere"}}));
    let disk = host.disk();
    let with = |context: Value| {
        director.ask(
            &json!({"method": "has_disk", "arguments": [disk], "context": context}).to_string(),
        )
    };
    let there = with(json!({"director_uuid": "d", "transport": sshd.transport()}));
    assert_eq!(*there.result(), true);
    assert!(
        with(json!({"director_uuid": "d"})).failure().message.contains("connect to '/nowhere'")
    );
}

#[test]
fn log_of_host_names_the_request() {
    let Some(Pair { host: _host, director, sshd: _sshd }) = Pair::new() else { return };
    let context = json!({"director_uuid": "d", "request_id": "cpi-778899"});
    let request = json!({"method": "has_vm", "arguments": ["vm-1"], "context": context});
    let answer = director.ask(&request.to_string());
    let mut lines = answer.stderr.lines();
    let called = lines.find(|line| line.contains("called by")).unwrap();
    assert!(called.contains(r#"request_id="cpi-778899""#), "{called}");
    let done = lines.find(|line| line.contains(": done ")).unwrap();
    assert!(done.contains("cpi-778899") && done.contains(r#"cid="vm-1""#), "{done}");
}

#[test]
fn info_without_reachable_host_succeeds() {
    let Some(director) = Director::new() else { return };
    director.configure(&json!({"transport": {"kind": "unix", "socket": "/nowhere"}}));
    assert_eq!(director.ok("info", &json!([]))["api_version"], 3);
}

#[test]
fn create_vm_forwards_agent_settings_and_defaults() {
    let Some(Pair { host, director, sshd }) = Pair::new() else { return };
    let canary = "nats://user:hunter2@10.0.0.6:4222";
    director.configure(&json!({
        "transport": sshd.transport(), "agent": {"mbus": canary}, "vm_defaults": {"ram": 65},
        "state_dir": "/nowhere",
    }));
    let stemcell = host.stemcell();
    let mut arguments = host.vm_arguments(&stemcell);
    arguments[2] = json!({});
    let created = director.call("create_vm", &arguments);
    let vm = crate::support::host::vm_cid(created.result());
    host.track_vms(&vm.to_string());
    assert_eq!(host.record(&vm).machine.ram.get(), 65);
    let drive = std::fs::read(host.paths(&vm).config_drive()).unwrap();
    assert!(
        drive.windows(canary.len()).any(|window| window == canary.as_bytes()),
        "the agent's settings"
    );
    assert!(!created.stderr.contains("hunter2") && !created.stdout.contains("hunter2"));
    director.ok("delete_vm", &json!([vm]));
    assert_eq!(director.ok("has_vm", &json!([vm])), false);
}
