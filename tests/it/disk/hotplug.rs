//! attach_disk and detach_disk with a faulty QEMU, a faulty guest or concurrent callers.

use std::os::unix::net::UnixStream;
use std::process::Child;
use std::time::{Duration, Instant};

use bosh_qemu_cpi::cid::{Cid, DiskCid, VmCid};
use bosh_qemu_cpi::store::record::AttachmentPhase;
use bosh_qemu_cpi::store::{DiskRecord, Phase};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::answer::Answer;
use crate::support::disks::{assert_data, disk_in_qemu, is_plugged, write_data};
use crate::support::host::{Host, eventually, vm_cid};

/// Whether the record of `vm` has `disk` in `phase`.
fn is_in_phase(host: &Host, vm: &VmCid, disk: &DiskCid, phase: AttachmentPhase) -> bool {
    host.record(vm).attachment(disk).is_some_and(|attachment| attachment.phase == phase)
}

fn answer(call: Child) -> Answer {
    Answer::of(&call.wait_with_output().unwrap())
}

#[test]
fn attach_and_detach_with_held_monitor_name_the_other_client() {
    let Some(host) = Host::with(json!({"deadlines": {"attach_disk": 2, "detach_disk": 2}})) else {
        return;
    };
    let vm = host.booted_vm();
    let (disk, attached) = (host.disk(), host.disk());
    host.ok("attach_disk", &json!([vm, attached]));
    // QEMU serves this client, which never sends anything.
    let silent = UnixStream::connect(host.paths(&vm).qmp()).unwrap();
    for (method, disk) in [("attach_disk", &disk), ("detach_disk", &attached)] {
        let began = Instant::now();
        let refused = host.call(method, &json!([vm, disk]));
        assert!(began.elapsed() < Duration::from_secs(20), "{method}: {:?}", began.elapsed());
        let socket = host.paths(&vm).qmp();
        for words in
            [method, disk.as_str(), socket.to_str().unwrap(), "did not greet", "another client"]
        {
            assert!(refused.failure().message.contains(words), "{words} in {refused:?}");
        }
    }
    // Calls that need no monitor work.
    assert_eq!(host.ok("has_vm", &json!([vm])), true);
    assert_eq!(host.ok("get_disks", &json!([vm])), json!([attached]));
    drop(silent);
    host.reconfigure(|config| config["deadlines"] = json!({}));
    host.ok("attach_disk", &json!([vm, disk]));
    host.ok("detach_disk", &json!([vm, attached]));
    assert_eq!(disk_in_qemu(&host, &vm, &disk), (true, 2, 1));
    assert_eq!(disk_in_qemu(&host, &vm, &attached), (false, 0, 0));
}

#[test]
fn attach_and_detach_with_hung_qemu_fail_and_can_be_repeated() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let disk = host.disk();
    for (method, back) in [("attach_disk", "detach_disk"), ("detach_disk", "attach_disk")] {
        host.ok(back, &json!([vm, disk]));
        host.reconfigure(|config| {
            config["deadlines"] = json!({"attach_disk": 3, "detach_disk": 3});
        });
        host.qemu(&vm).unwrap().signal(Signal::SIGSTOP).unwrap();
        let refused = host.call(method, &json!([vm, disk]));
        assert!(refused.failure().message.contains("did not greet"), "{refused:?}");
        host.qemu(&vm).unwrap().signal(Signal::SIGCONT).unwrap();
        host.reconfigure(|config| config["deadlines"] = json!({}));
        host.ok(method, &json!([vm, disk]));
        let wanted = if method == "attach_disk" { (true, 2, 1) } else { (false, 0, 0) };
        assert_eq!(disk_in_qemu(&host, &vm, &disk), wanted);
    }
}

/// Starts `method` with a hung QEMU and kills QEMU when the record says `phase`. Returns the
/// result.
fn killed_in_mid_call(
    host: &Host,
    method: &str,
    vm: &VmCid,
    disk: &DiskCid,
    phase: AttachmentPhase,
) -> Value {
    let qemu = host.qemu(vm).unwrap();
    qemu.signal(Signal::SIGSTOP).unwrap();
    let call = host.start(method, &json!([vm, disk]));
    eventually("the call waits for QEMU", || is_in_phase(host, vm, disk, phase).then_some(()));
    qemu.signal(Signal::SIGKILL).unwrap();
    answer(call).result().clone()
}

#[test]
fn kill_qemu_during_attach_restarts_it_with_the_disk() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let disk = host.disk();
    killed_in_mid_call(&host, "attach_disk", &vm, &disk, AttachmentPhase::Attaching);
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
    assert!(is_plugged(&host, &vm, &disk));
    assert_eq!(host.ok("get_disks", &json!([vm])), json!([disk]));
}

#[test]
fn kill_qemu_during_detach_restarts_it_without_the_disk() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let disk = host.disk();
    write_data(&host, &disk);
    host.ok("attach_disk", &json!([vm, disk]));
    killed_in_mid_call(&host, "detach_disk", &vm, &disk, AttachmentPhase::Detaching);
    // The image is unlocked before the supervisor restarts the VM.
    assert_data(&host, &disk);
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
    assert_eq!(disk_in_qemu(&host, &vm, &disk), (false, 0, 0));
}

/// Makes the guest eject the disk, without a request of QEMU.
fn eject(host: &Host, vm: &VmCid, disk: &DiskCid) {
    // The writes of a guest to its hot-plug registers (guests/acpi-bootsector.S): each bus, then
    // its first slot.
    host.qmp(vm, "stop", &json!({})).unwrap();
    for bus in 0..32 {
        for write in [format!("o /w 0xcd0 {bus}"), "o /w 0xcc8 1".to_owned()] {
            host.qmp(vm, "human-monitor-command", &json!({"command-line": write})).unwrap();
        }
    }
    host.qmp(vm, "cont", &json!({})).unwrap();
    eventually("the guest ejects", || (!is_plugged(host, vm, disk)).then_some(()));
}

#[test]
fn change_ejected_disk_succeeds() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let disk = host.disk();
    write_data(&host, &disk);
    for (method, arguments) in [
        ("update_disk", json!([disk, 8, {"iops": 100}])),
        ("update_disk", json!([disk, 8, {"iops": 100, "format": "raw"}])),
        ("resize_disk", json!([disk, 9])),
        ("snapshot_disk", json!([disk, {}])),
    ] {
        host.ok("attach_disk", &json!([vm, disk]));
        eject(&host, &vm, &disk);
        host.ok(method, &arguments);
        assert_eq!(disk_in_qemu(&host, &vm, &disk), (false, 0, 0), "{method}");
        assert_eq!(
            host.ok("get_disks", &json!([vm])),
            json!([disk]),
            "the record still has the disk"
        );
    }
    host.ok("attach_disk", &json!([vm, disk]));
    host.ok("detach_disk", &json!([vm, disk]));
    let path =
        host.store().disk_image(&host.store().read::<DiskRecord>(&disk).unwrap().unwrap()).unwrap();
    assert_eq!(path.file_name().unwrap(), "disk-1.raw");
}

#[test]
fn attach_or_detach_ejected_disk_succeeds() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let disk = host.disk();
    write_data(&host, &disk);
    let eject = || eject(&host, &vm, &disk);
    host.ok("attach_disk", &json!([vm, disk]));
    eject();
    assert_eq!(host.ok("get_disks", &json!([vm])), json!([disk]), "the record still has the disk");
    let other = host.vm(&host.stemcell());
    let refused = host.call("attach_disk", &json!([other, disk]));
    assert!(
        refused.failure().message.contains(&format!("is attached to VM '{vm}'")),
        "{refused:?}"
    );
    host.ok("attach_disk", &json!([vm, disk]));
    assert_eq!(disk_in_qemu(&host, &vm, &disk), (true, 2, 1));
    eject();
    host.ok("detach_disk", &json!([vm, disk]));
    assert_eq!(disk_in_qemu(&host, &vm, &disk), (false, 0, 0));
    assert_data(&host, &disk);
}

#[test]
fn detach_disk_unlocks_its_image_at_once() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let disk = host.disk();
    write_data(&host, &disk);
    for _ in 0..5 {
        host.ok("attach_disk", &json!([vm, disk]));
        host.ok("detach_disk", &json!([vm, disk]));
        assert_data(&host, &disk);
    }
}

#[test]
fn create_vm_with_extra_disks_slots_takes_more_disks() {
    let Some(host) = Host::with(json!({"qemu": {"hotplug_slots": 16}})) else { return };
    let mut arguments = host.vm_arguments(&host.stemcell());
    arguments[2]["extra_disks_slots"] = json!(4);
    let vm = vm_cid(&host.ok("create_vm", &arguments));
    let disks: Vec<_> = (0..20).map(|_| host.disk()).collect();
    for disk in &disks {
        host.ok("attach_disk", &json!([vm, disk]));
    }
    assert_eq!(host.ok("get_disks", &json!([vm])), json!(disks));
    let refused = host.call("attach_disk", &json!([vm, host.disk()]));
    assert!(refused.failure().message.contains("all 20 disk slots"), "{refused:?}");
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    for disk in disks.iter().rev() {
        host.ok("detach_disk", &json!([vm, disk]));
    }
}

#[test]
fn attach_and_detach_concurrently_agree_with_the_record() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let disks = [host.disk(), host.disk()];
    let client = |methods: [&str; 2]| {
        for round in 0..6 {
            for method in methods {
                host.ok(method, &json!([vm, disks[round % 2]]));
            }
        }
    };
    std::thread::scope(|threads| {
        threads.spawn(|| client(["attach_disk", "detach_disk"]));
        threads.spawn(|| client(["detach_disk", "attach_disk"]));
        threads.spawn(|| client(["attach_disk", "attach_disk"]));
    });
    let listed = host.ok("get_disks", &json!([vm]));
    for disk in &disks {
        let attached = listed.as_array().unwrap().contains(&json!(disk));
        assert_eq!(
            disk_in_qemu(&host, &vm, disk),
            if attached { (true, 2, 1) } else { (false, 0, 0) }
        );
    }
}

#[test]
fn attach_disk_during_delete_of_its_vm_waits_for_it() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let (old, new, disk) = (host.vm(&stemcell), host.vm(&stemcell), host.disk());
    host.ok("attach_disk", &json!([old, disk]));
    // QEMU is stopped, so delete_vm must kill it after a while.
    host.qemu(&old).unwrap().signal(Signal::SIGSTOP).unwrap();
    let removal = host.start("delete_vm", &json!([old]));
    eventually("delete_vm runs", || (host.record(&old).phase == Phase::Deleting).then_some(()));
    let again = host.call("attach_disk", &json!([old, disk]));
    assert_eq!(again.failure().kind, "VMNotFound", "{again:?}");
    host.ok("attach_disk", &json!([new, disk]));
    answer(removal).result();
    assert!(is_plugged(&host, &new, &disk));
}
