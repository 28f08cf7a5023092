//! Supervisors: their records of exits and events, restarts of VMs, and VMs without a supervisor.

use std::fs;
use std::io::Write;
use std::time::{Duration, Instant};

use bosh_qemu_cpi::cid::VmCid;
use bosh_qemu_cpi::supervisor::{Ending, ExitRecord, cancel_launch};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::host::{
    Host, PANICKING_GUEST, command_line, eventually, json_options, wait_for_exit,
};

/// Names of all events in order. Each line of the file must be a JSON object.
fn events(host: &Host, vm: &VmCid) -> Vec<String> {
    let text = fs::read_to_string(host.paths(vm).events()).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines
        .map(|line| {
            assert!(line["at"].is_string() && line["run"].is_u64(), "{line}");
            line["event"].as_str().unwrap().to_owned()
        })
        .collect()
}

fn exit(host: &Host, vm: &VmCid) -> ExitRecord {
    ExitRecord::read(&host.paths(vm).exit()).unwrap().expect("an exit record")
}

#[test]
fn poweroff_of_guest_is_recorded_and_final() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    assert_eq!(ExitRecord::read(&host.paths(&vm).exit()).unwrap(), None);
    host.power_off(&vm);
    let exit = exit(&host, &vm);
    assert_eq!((exit.run, exit.code, exit.signal), (1, Some(0), None));
    assert_eq!(
        (exit.reason.as_deref(), exit.ending()),
        (Some("guest-shutdown"), Ending::PoweredOff)
    );
    let events = events(&host, &vm);
    assert_eq!(events.first().map(String::as_str), Some("started"));
    assert_eq!(events.last().map(String::as_str), Some("exited"));
    for event in ["POWERDOWN", "SHUTDOWN"] {
        assert!(events.iter().any(|e| e == event), "{event} in {events:?}");
    }
    let console = fs::read_to_string(host.paths(&vm).console_log()).unwrap();
    assert!(console.contains("BOOTSECTOR-OK\n") && console.ends_with("OFF\n"), "{console:?}");
}

#[test]
fn quit_of_qemu_is_no_crash() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let supervisor = host.supervisor(&vm).unwrap();
    // QEMU may exit before it answers.
    let _ = host.qmp(&vm, "quit", &json!({}));
    wait_for_exit(&supervisor);
    let exit = exit(&host, &vm);
    assert_eq!(
        (exit.code, exit.reason.as_deref(), exit.ending()),
        (Some(0), Some("host-qmp-quit"), Ending::Stopped)
    );
    assert!(host.qemu(&vm).is_none());
}

/// The supervisor restarts the VM after 1, 5 and 15 seconds, and then gives up.
#[test]
fn crash_repeatedly_gives_the_vm_up() {
    let Some(host) = Host::new() else { return };
    let vm = host.vm(&host.import(PANICKING_GUEST));
    let supervisor = host.supervisor(&vm).unwrap();
    host.wait_for_event(&vm, "gave up", 1);
    wait_for_exit(&supervisor);
    let events = events(&host, &vm);
    let times = |event: &str| events.iter().filter(|e| *e == event).count();
    assert_eq!(
        ["started", "exited", "restarting", "gave up"].map(times),
        [4, 4, 3, 1],
        "{events:?}"
    );
    assert!(host.qemu(&vm).is_none());
    assert_eq!(exit(&host, &vm).ending(), Ending::Crashed);
    // reboot_vm resets the count of restarts.
    host.ok("reboot_vm", &json!([vm]));
    host.wait_for_event(&vm, "restarting", 4);
}

#[test]
fn crash_with_restart_never_leaves_the_vm_off() {
    let Some(host) = Host::with(json!({"restart": "never"})) else { return };
    let vm = host.booted_vm();
    let supervisor = host.supervisor(&vm).unwrap();
    host.kill_qemu(&vm);
    wait_for_exit(&supervisor);
    let exit = exit(&host, &vm);
    assert_eq!((exit.code, exit.signal, exit.ending()), (None, Some(9), Ending::Crashed));
    assert!(!events(&host, &vm).contains(&"restarting".to_owned()));
}

/// The part of a command line that the guest can observe.
fn hardware(words: &[String]) -> (Vec<Value>, Vec<String>) {
    let devices = json_options(words, "-device");
    let plain = ["-name", "-uuid", "-smbios", "-machine", "-cpu", "-smp", "-m"];
    let options = words
        .windows(2)
        .filter(|pair| plain.contains(&pair[0].as_str()))
        .map(|pair| pair[1].clone());
    (devices, options.collect())
}

#[test]
fn crash_of_qemu_restarts_the_vm_with_the_same_hardware() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let (kept, released) = (host.disk(), host.disk());
    for disk in [&released, &kept] {
        host.ok("attach_disk", &json!([vm, disk]));
    }
    host.ok("detach_disk", &json!([vm, released]));
    host.ok("reboot_vm", &json!([vm]));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
    let before = host.qemu(&vm).unwrap();
    let hardware_before = hardware(&command_line(&before));
    assert!(hardware_before.0.iter().any(|device| device["serial"] == json!(kept)));
    let supervisor = host.supervisor(&vm).unwrap();
    host.kill_qemu(&vm);
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 3);
    let after = host.qemu(&vm).expect("a new QEMU");
    assert_ne!(after.pid(), before.pid());
    assert_eq!(host.supervisor(&vm).unwrap().pid(), supervisor.pid());
    assert_eq!(hardware(&command_line(&after)), hardware_before);
    let events = events(&host, &vm);
    for (event, times) in [("started", 3), ("exited", 2), ("restarting", 1)] {
        assert_eq!(events.iter().filter(|e| *e == event).count(), times, "{event} in {events:?}");
    }
    assert_eq!(exit(&host, &vm).signal, Some(9));
    // The restarted VM takes calls as before.
    host.ok("detach_disk", &json!([vm, kept]));
    assert_eq!(host.ok("get_disks", &json!([vm])), json!([]));
}

#[test]
fn kill_supervisor_keeps_the_vm_running() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let (disk, qemu) = (host.disk(), host.qemu(&vm).unwrap());
    let supervisor = host.supervisor(&vm).unwrap();
    supervisor.signal(Signal::SIGKILL).unwrap();
    wait_for_exit(&supervisor);
    assert_eq!(host.ok("has_vm", &json!([vm])), true);
    assert_eq!(host.ok("get_disks", &json!([vm])), json!([]));
    assert!(host.supervisor(&vm).is_none(), "reading calls start no supervisor");

    host.ok("attach_disk", &json!([vm, disk]));
    assert_eq!(host.ok("get_disks", &json!([vm])), json!([disk]));
    host.ok("detach_disk", &json!([vm, disk]));
    assert_eq!(host.qemu(&vm).expect("still running").pid(), qemu.pid());
    let supervisor = host.supervisor(&vm).expect("a new one");
    supervisor.signal(Signal::SIGKILL).unwrap();
    wait_for_exit(&supervisor);
    host.ok("delete_vm", &json!([vm]));
    host.delete_everything();
    host.assert_no_leaks();
}

/// A guest can make QEMU print without end. Here the test prints through QEMU's descriptor.
#[test]
fn print_by_qemu_without_end_keeps_its_log_within_a_limit() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let print = |line: &str, times| {
        let path = format!("/proc/{}/fd/2", host.qemu(&vm).unwrap().pid());
        let mut output = fs::OpenOptions::new().append(true).open(path).unwrap();
        for _ in 0..times {
            output.write_all(line.as_bytes()).unwrap();
        }
    };
    let dir = host.paths(&vm).dir;
    let logs = || ["qemu.log", "qemu.log.1"].map(|name| fs::read(dir.join(name)).unwrap());
    let wait_for = |word: &str| {
        eventually(word, || logs()[0].ends_with(format!("{word}\n").as_bytes()).then_some(()));
    };
    print(&format!("{}\n", "x".repeat(4095)), 1024);
    print("last words\n", 1);
    wait_for("last words");
    for log in logs() {
        assert!(log.len() <= 256 << 10, "{} bytes", log.len());
    }

    // QEMU goes on without a supervisor, and the next one reads what it prints from then on.
    let supervisor = host.supervisor(&vm).unwrap();
    supervisor.signal(Signal::SIGKILL).unwrap();
    wait_for_exit(&supervisor);
    host.qmp(&vm, "human-monitor-command", &json!({"command-line": "info version"})).unwrap();
    host.ok("set_vm_metadata", &json!([vm, {}]));
    let disk = host.disk();
    host.ok("attach_disk", &json!([vm, disk]));
    print("adopted\n", 1);
    wait_for("adopted");
}

#[test]
fn terminate_supervisor_powers_the_guest_off() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let supervisor = host.supervisor(&vm).unwrap();
    supervisor.signal(Signal::SIGTERM).unwrap();
    wait_for_exit(&supervisor);
    let exit = exit(&host, &vm);
    assert!(exit.host_stopping);
    assert_eq!(exit.ending(), Ending::Stopped, "host start starts it again");
}

#[test]
fn supervise_vm_stays_within_memory_bound() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let disk = host.disk();
    host.ok("attach_disk", &json!([vm, disk]));
    let path = format!("/proc/{}/status", host.supervisor(&vm).unwrap().pid());
    let kib = eventually("RSS", || {
        let status = fs::read_to_string(&path).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    });
    // A debug build has three times the code and data of a release build.
    let most = if cfg!(debug_assertions) { 15 << 10 } else { 5 << 10 };
    assert!(kib <= most, "{kib} KiB");
}

/// delete_vm cancels a launch in progress if another call holds the VM's lock. The cancellation
/// must not affect a guest that runs.
#[test]
fn cancel_launch_of_running_vm_has_no_effect() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let (qemu, supervisor) = (host.qemu(&vm).unwrap(), host.supervisor(&vm).unwrap());
    cancel_launch(&host.paths(&vm)).unwrap();
    host.ok("set_vm_metadata", &json!([vm, {}]));
    assert!(!qemu.wait_exit(Instant::now() + Duration::from_millis(500)).unwrap());
    assert_eq!(host.supervisor(&vm).expect("the supervisor runs").pid(), supervisor.pid());
    // The next launch is not cancelled either.
    host.kill_qemu(&vm);
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
}

#[test]
fn panic_of_guest_restarts_the_vm() {
    let Some(host) = Host::new() else { return };
    let vm = host.vm(&host.import(PANICKING_GUEST));
    host.wait_for_event(&vm, "GUEST_PANICKED", 2);
    let events = events(&host, &vm);
    let times = |event: &str| events.iter().filter(|e| *e == event).count();
    assert!(times("restarting") >= 1 && times("started") >= 2, "{events:?}");
    let exit = exit(&host, &vm);
    assert_eq!((exit.reason.as_deref(), exit.ending()), (Some("guest-panic"), Ending::Crashed));
}

#[test]
fn panic_with_restart_never_leaves_the_vm_off() {
    let Some(host) = Host::with(json!({"restart": "never"})) else { return };
    let vm = host.vm(&host.import(PANICKING_GUEST));
    host.wait_for_event(&vm, "exited", 1);
    let written = || ExitRecord::read(&host.paths(&vm).exit()).unwrap();
    let exit = eventually("an exit record", written);
    assert_eq!(
        (exit.code, exit.reason.as_deref(), exit.ending()),
        (Some(1), Some("guest-panic"), Ending::Crashed)
    );
    let listed = host.command(&["vm", "list", "--json"]).1;
    assert_eq!(
        (&listed[0]["state"], &listed[0]["reason"]),
        (&json!("crashed"), &json!("exit status 1 (guest-panic)"))
    );
    assert!(!events(&host, &vm).contains(&"restarting".to_owned()));
}

#[test]
fn reboot_inside_guest_keeps_qemu_and_its_disks() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let disk = host.disk();
    host.ok("attach_disk", &json!([vm, disk]));
    let (qemu, supervisor) = (host.qemu(&vm).unwrap().pid(), host.supervisor(&vm).unwrap().pid());
    // The write of a guest that resets itself (ICH9 reset control register).
    host.qmp(&vm, "human-monitor-command", &json!({"command-line": "o /b 0xcf9 6"})).unwrap();
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
    assert_eq!(
        (host.qemu(&vm).unwrap().pid(), host.supervisor(&vm).unwrap().pid()),
        (qemu, supervisor)
    );
    assert_eq!(host.ok("get_disks", &json!([vm])), json!([disk]));
    let events = events(&host, &vm);
    assert!(
        events.contains(&"RESET".to_owned()) && !events.contains(&"exited".to_owned()),
        "{events:?}"
    );
    host.ok("detach_disk", &json!([vm, disk]));
    host.power_off(&vm);
    assert_eq!(
        exit(&host, &vm).ending(),
        Ending::PoweredOff,
        "a later poweroff is recorded as such"
    );
}
