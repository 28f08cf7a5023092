//! `vm list`: VMs in every state, also when a QEMU hangs.

use std::time::{Duration, Instant};

use bosh_qemu_cpi::cid::{Cid, VmCid};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::host::Host;
use crate::support::vm_list::{run_vm_list, vm_list};

/// The entry of one VM.
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
fn list_vms_reports_every_state() {
    let Some(host) = Host::with(json!({"restart": "never"})) else { return };
    assert_eq!(vm_list(&host), json!([]));
    let stemcell = host.stemcell();
    let vms: Vec<_> = (0..5).map(|_| host.vm(&stemcell)).collect();
    let [running, stopped, crashed, paused, hung] = &vms[..] else { unreachable!() };
    for vm in &vms {
        host.wait_for_console(vm, "BOOTSECTOR-OK", 1);
    }
    let disk = host.disk();
    host.ok("attach_disk", &json!([running, disk]));
    host.ok("set_vm_metadata", &json!([running, {"name": "db/0"}]));
    host.power_off(stopped);
    let supervisor = host.supervisor(crashed).unwrap();
    host.kill_qemu(crashed);
    crate::support::host::wait_for_exit(&supervisor);
    host.qmp(paused, "stop", &json!({})).unwrap();
    host.qemu(hung).unwrap().signal(Signal::SIGSTOP).unwrap();

    let began = Instant::now();
    let mut table = run_vm_list(&host, &[]);
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "a VM that hangs does not hold up the others"
    );
    if table.matches("silent").count() > 1 {
        // On a busy host a healthy QEMU may miss the timeout.
        table = run_vm_list(&host, &[]);
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
fn list_vm_with_unreadable_record_names_the_reason() {
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
