//! `vm list`: every VM in every state, and none that holds it up.

use std::time::{Duration, Instant};

use bosh_qemu_cpi::cid::{Cid, VmCid};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::host::{Host, eventually};

fn run(host: &Host, words: &[&str]) -> String {
    let output =
        host.namespace().run(|| host.cpi().args(["vm", "list"]).args(words).output().unwrap());
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What `vm list --json` says.
pub fn vm_list(host: &Host) -> Value {
    serde_json::from_str(&run(host, &["--json"])).unwrap()
}

/// The same where no QEMU hangs. On a host that is busy, one that is well may take longer than it is given: it is asked again.
pub fn answering(host: &Host) -> Value {
    eventually("every QEMU answers", || {
        let listed = vm_list(host);
        listed.as_array().unwrap().iter().all(|line| line["state"] != "silent").then_some(listed)
    })
}

/// What it says of one VM.
fn listed(host: &Host, vm: &VmCid) -> Value {
    let list = vm_list(host);
    list.as_array()
        .unwrap()
        .iter()
        .find(|line| line["cid"] == json!(vm))
        .expect("it is listed")
        .clone()
}

#[test]
fn every_state_is_told() {
    let Some(host) = Host::with(json!({"restart": "never"})) else { return };
    assert_eq!(vm_list(&host), json!([]));
    let stemcell = host.stemcell();
    let vms: Vec<_> = (0..5).map(|_| host.vm(&stemcell)).collect();
    let [running, stopped, crashed, paused, hung] = &vms[..] else { unreachable!() };
    for vm in &vms {
        host.sees(vm, "BOOTSECTOR-OK", 1);
    }
    let disk = host.disk();
    host.ok("attach_disk", &json!([running, disk]));
    host.ok("set_vm_metadata", &json!([running, {"name": "db/0"}]));
    host.power_off(stopped);
    let supervisor = host.supervisor(crashed).unwrap();
    host.crash(crashed);
    crate::support::host::gone(&supervisor);
    host.qmp(paused, "stop", &json!({})).unwrap();
    host.qemu(hung).unwrap().signal(Signal::SIGSTOP).unwrap();

    let began = Instant::now();
    let mut table = run(&host, &[]);
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "a VM that hangs does not hold up the others"
    );
    if table.matches("silent").count() > 1 {
        // On a host that is busy, one that is well may take longer than it is given.
        table = run(&host, &[]);
    }
    let line = |vm: &VmCid| {
        table.lines().find(|line| line.starts_with(vm.as_str())).expect("it is listed")
    };
    for (vm, words) in [
        (running, "running"),
        (stopped, "stopped: exit status 0 (guest-shutdown)"),
        (crashed, "crashed: killed by signal 9"),
        (paused, "paused: paused"),
        (hung, "silent: monitor"),
    ] {
        assert!(line(vm).contains(words), "{words} in {table}");
    }
    for word in [disk.as_str(), " tcg ", " db/0 "] {
        assert!(line(running).contains(word), "{word} in {table}");
    }

    host.qemu(hung).unwrap().signal(Signal::SIGCONT).unwrap();
    let seen = listed(&host, running);
    assert_eq!(
        (&seen["state"], &seen["accelerator"], &seen["memory_mib"]),
        (&json!("running"), &json!("tcg"), &json!(64))
    );
    assert_eq!(seen["pid"], host.qemu(running).unwrap().pid());
    assert_eq!(seen["disks"], json!([{"disk": disk, "phase": "attached"}]));
    assert_eq!(seen["networks"][0]["name"], "net");
}

#[test]
fn a_record_that_can_not_be_read_is_listed_with_why() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let record = host.paths(&vm).dir.join("vm.json");
    let good = std::fs::read(&record).unwrap();
    std::fs::write(&record, "{").unwrap();
    let seen = listed(&host, &vm);
    assert_eq!(seen["state"], "unknown");
    assert!(seen["reason"].as_str().unwrap().contains("cannot be used"), "{seen}");
    std::fs::write(&record, good).unwrap();
}
