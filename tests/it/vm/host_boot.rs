//! Boot, shutdown and power cut of the host, and the death of a supervisor. Every VM is restored.

use bosh_qemu_cpi::cid::{Cid, VmCid};
use bosh_qemu_cpi::store::record::Desired;
use bosh_qemu_cpi::supervisor::{Ending, ExitRecord};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::host::{
    Host, MUTE_GUEST, command_line, eventually, json_options, wait_for_exit,
};
use crate::support::skip;

fn start(host: &Host) -> Vec<(String, Value)> {
    outcomes(host, &["host", "start", "--json"])
}

/// Runs a command and returns each VM with its outcome, in order.
fn outcomes(host: &Host, words: &[&str]) -> Vec<(String, Value)> {
    let (passed, printed) = host.command(words);
    assert!(passed, "{printed}");
    assert_eq!(printed["passed"], true);
    let vms = printed["vms"].as_array().unwrap();
    vms.iter().map(|vm| (vm["vm"].as_str().unwrap().to_owned(), vm["state"].clone())).collect()
}

fn hardware(host: &Host, vm: &VmCid) -> Vec<Value> {
    let words = command_line(&host.qemu(vm).expect("QEMU"));
    let mut devices = json_options(&words, "-device");
    // Numbers of descriptors differ and are not part of the hardware.
    devices.iter_mut().for_each(|device| drop(device.as_object_mut().unwrap().remove("fd")));
    devices
}

fn exit(host: &Host, vm: &VmCid) -> Option<ExitRecord> {
    ExitRecord::read(&host.paths(vm).exit()).unwrap()
}

#[test]
fn host_start_after_power_cut_restores_running_vms() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let (first, second, off) = (host.vm(&stemcell), host.vm(&stemcell), host.vm(&stemcell));
    host.wait_for_console(&off, "BOOTSECTOR-OK", 1);
    host.power_off(&off);
    host.wait_for_console(&first, "BOOTSECTOR-OK", 1);
    let disk = host.disk();
    host.ok("attach_disk", &json!([first, disk]));
    // After a cold start the disk is on QEMU's command line.
    host.ok("reboot_vm", &json!([first]));
    host.wait_for_console(&first, "BOOTSECTOR-OK", 2);
    let before = [&first, &second].map(|vm| (hardware(&host, vm), host.record(vm).nics));

    host.lose_power();
    let back = start(&host);
    assert_eq!(back.len(), 3);
    let state = |vm: &VmCid| &back.iter().find(|(cid, _)| cid == vm.as_str()).unwrap().1;
    assert_eq!([state(&first), state(&second)], [&json!("started"); 2]);
    assert_eq!(state(&off), &json!({"off": "its guest powered itself off"}));
    host.wait_for_console(&first, "BOOTSECTOR-OK", 3);
    host.wait_for_console(&second, "BOOTSECTOR-OK", 2);
    assert_eq!([&first, &second].map(|vm| (hardware(&host, vm), host.record(vm).nics)), before);
    assert_eq!(host.ok("get_disks", &json!([first])), json!([disk]));
    host.ok("detach_disk", &json!([first, disk]));
    // A second `host start` changes nothing.
    let again = start(&host);
    assert!(
        again.iter().filter(|(cid, _)| cid != off.as_str()).all(|(_, state)| state == "running"),
        "{again:?}"
    );
    assert_eq!(host.ok("has_vm", &json!([off])), true);
}

#[test]
fn host_start_after_host_stop_starts_every_vm_again() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let alone = host.vm(&host.stemcell());
    host.wait_for_console(&alone, "BOOTSECTOR-OK", 1);
    let supervisor = host.supervisor(&alone).unwrap();
    supervisor.signal(Signal::SIGKILL).unwrap();
    wait_for_exit(&supervisor);

    let down = outcomes(&host, &["host", "stop", "--json"]);
    assert!(down.iter().all(|(_, state)| state == "stopped"), "{down:?}");
    assert!(
        host.qemu(&vm).is_none() && host.supervisor(&vm).is_none() && host.qemu(&alone).is_none()
    );
    let exit = exit(&host, &vm).unwrap();
    assert_eq!((exit.ending(), exit.reason.as_deref()), (Ending::Stopped, Some("guest-shutdown")));
    assert_eq!(host.record(&vm).desired, Desired::Running);
    let down_again = outcomes(&host, &["host", "stop", "--json"]);
    assert!(down_again.iter().all(|(_, state)| state["off"] == "it was off"), "{down_again:?}");

    assert!(start(&host).iter().all(|(_, state)| state == "started"));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
}

#[test]
fn host_stop_with_unresponsive_guest_ends_it_at_the_timeout() {
    let Some(host) = Host::new() else { return };
    let vm = host.vm(&host.import(MUTE_GUEST));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    let down = outcomes(&host, &["host", "stop", "--timeout", "1", "--json"]);
    assert_eq!(down, [(vm.to_string(), json!("stopped"))]);
    assert_eq!(exit(&host, &vm).unwrap().ending(), Ending::Stopped);
    assert_eq!(start(&host), [(vm.to_string(), json!("started"))]);
}

#[test]
fn host_start_follows_start_priority() {
    let Some(host) = Host::with(json!({"limits": {"parallel_boots": 1}})) else { return };
    let stemcell = host.stemcell();
    let [plain, director, database] = std::array::from_fn(|_| host.vm(&stemcell));
    host.ok("set_vm_metadata", &json!([plain, {"name": "web/0", "director": "lab"}]));
    host.ok("set_vm_metadata", &json!([director, {"name": "bosh/0", "director": "bosh-init"}]));
    host.ok(
        "set_vm_metadata",
        &json!([database, {"name": "db/0", "director": "lab", "start_priority": "7"}]),
    );
    host.lose_power();
    let order: Vec<_> = start(&host).into_iter().map(|(cid, _)| cid).collect();
    assert_eq!(order, [database, director, plain].map(|vm| vm.to_string()));
}

#[test]
fn host_start_with_one_broken_vm_starts_the_others() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let (sound, broken) = (host.vm(&stemcell), host.vm(&stemcell));
    host.lose_power();
    let (root, aside) = (host.paths(&broken).dir.join("root.qcow2"), host.path("aside"));
    std::fs::rename(&root, &aside).unwrap();
    let (passed, printed) = host.command(&["host", "start", "--json"]);
    assert!(!passed);
    assert_eq!(printed["passed"], false);
    let state = |vm: &VmCid| {
        let vms = printed["vms"].as_array().unwrap();
        vms.iter().find(|outcome| outcome["vm"] == vm.as_str()).unwrap()["state"].clone()
    };
    assert_eq!(state(&sound), "started");
    assert!(
        state(&broken)["failed"].as_str().unwrap().contains(root.to_str().unwrap()),
        "{printed}"
    );
    std::fs::rename(&aside, &root).unwrap();
    let again = start(&host);
    assert!(again.contains(&(broken.to_string(), json!("started"))), "{again:?}");
}

#[test]
fn call_on_vm_without_supervisor_starts_one() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let lose_supervisor = || {
        let supervisor = host.supervisor(&vm).expect("a supervisor");
        supervisor.signal(Signal::SIGKILL).unwrap();
        wait_for_exit(&supervisor);
    };
    let (disk, qemu) = (host.disk(), host.qemu(&vm).unwrap().pid());
    lose_supervisor();
    host.ok("attach_disk", &json!([vm, disk]));
    host.wait_for_event(&vm, "adopted", 1);
    host.wait_for_console(&vm, "\nU", 1);
    lose_supervisor();
    host.ok("set_vm_metadata", &json!([vm, {"name": "web/0"}]));
    host.wait_for_event(&vm, "adopted", 2);
    lose_supervisor();
    assert_eq!(start(&host), [(vm.to_string(), json!("adopted"))]);
    assert_eq!(host.qemu(&vm).expect("the same QEMU").pid(), qemu);

    // The new supervisor restarts the VM after a crash.
    host.kill_qemu(&vm);
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
    assert_eq!(host.ok("get_disks", &json!([vm])), json!([disk]));
    lose_supervisor();
    assert_eq!(start(&host), [(vm.to_string(), json!("adopted"))]);
    host.power_off(&vm);
    assert_eq!(exit(&host, &vm).unwrap().ending(), Ending::PoweredOff);
    assert_eq!(start(&host), [(vm.to_string(), json!({"off": "its guest powered itself off"}))]);
}

/// The call and the supervisor are killed after the start of QEMU and before the start of its
/// guest.
#[test]
fn call_after_interrupted_launch_launches_again() {
    if !cfg!(debug_assertions) {
        return skip("crash points are for builds with debug assertions");
    }
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let begin_again: [fn(&Host, &VmCid); 2] = [
        |host, vm| assert_eq!(start(host), [(vm.to_string(), json!("started"))]),
        |host, vm| drop(host.ok("set_vm_metadata", &json!([vm, {}]))),
    ];
    for (boots, begin) in (2..).zip(begin_again) {
        host.lose_power();
        let mut command = host.cpi();
        command.args(["host", "start"]);
        command.env(
            "BOSH_QEMU_CPI_CRASH_AT",
            "supervisor spawned;supervisor: qmp query-kvm: answered",
        );
        let output = host.namespace().run(|| command.output().unwrap());
        assert!(!output.status.success(), "host start was not killed: {output:?}");
        eventually("the launch is interrupted", || {
            let half = host.qemu(&vm).is_some() && host.supervisor(&vm).is_none();
            half.then(|| host.qmp(&vm, "query-status", &json!({})).ok()).flatten()
        });
        begin(&host, &vm);
        host.wait_for_console(&vm, "BOOTSECTOR-OK", boots);
        assert!(host.supervisor(&vm).is_some());
    }
}

#[test]
fn adopt_hung_qemu_fails_and_leaves_it_running() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let supervisor = host.supervisor(&vm).unwrap();
    supervisor.signal(Signal::SIGKILL).unwrap();
    wait_for_exit(&supervisor);
    let qemu = host.qemu(&vm).unwrap();
    qemu.signal(Signal::SIGSTOP).unwrap();
    let answer = host.call("set_vm_metadata", &json!([vm, {"name": "web/0"}]));
    assert!(answer.outcome.is_ok(), "a record can be written whatever QEMU does: {answer:?}");
    assert!(answer.stderr.contains("cannot start a supervisor"), "{}", answer.stderr);
    qemu.signal(Signal::SIGCONT).unwrap();
    assert_eq!(start(&host), [(vm.to_string(), json!("adopted"))]);
    assert_eq!(host.qemu(&vm).unwrap().pid(), qemu.pid());
}
