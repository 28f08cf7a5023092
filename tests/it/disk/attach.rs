//! attach_disk and detach_disk in every power state of the VM. No data is lost.

use std::fs;
use std::time::{Duration, Instant};

use bosh_qemu_cpi::cid::{Cid, DiskCid, VmCid};
use bosh_qemu_cpi::store::{DiskRecord, Phase, Rank, VmRecord};
use serde_json::{Value, json};

use crate::support::answer::Answer;
use crate::support::disks::{assert_data, disk_in_qemu, is_plugged, write_data};
use crate::support::host::{Host, MUTE_GUEST, command_line, json_options, text, wait_for_exit};
use crate::support::images::image;

fn attach(host: &Host, vm: &VmCid, disk: &DiskCid) -> Answer {
    host.call("attach_disk", &json!([vm, disk]))
}

fn hint(disk: &DiskCid) -> Value {
    json!({"path": format!("/dev/disk/by-id/virtio-{disk}")})
}

#[test]
fn attach_and_detach_disk_repeatedly_succeed() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let disk = host.disk();
    for round in 1..=3 {
        assert_eq!(*attach(&host, &vm, &disk).result(), hint(&disk));
        assert!(is_plugged(&host, &vm, &disk));
        host.wait_for_console(&vm, "\nU", round);
        assert_eq!(*attach(&host, &vm, &disk).result(), hint(&disk), "a repeated call");
        assert_eq!(host.ok("get_disks", &json!([vm])), json!([disk]));
        host.ok("detach_disk", &json!([vm, disk]));
        assert!(!is_plugged(&host, &vm, &disk));
        host.wait_for_console(&vm, "\nD", round);
        host.ok("detach_disk", &json!([vm, disk]));
        assert_eq!(host.ok("get_disks", &json!([vm])), json!([]));
    }
    assert_eq!(attach(&host, &vm, &DiskCid::random()).failure().kind, "DiskNotFound");
    assert_eq!(attach(&host, &VmCid::random(), &disk).failure().kind, "VMNotFound");
    assert_eq!(
        host.call("detach_disk", &json!([VmCid::random(), disk])).failure().kind,
        "VMNotFound"
    );
    host.ok("detach_disk", &json!([vm, DiskCid::random()]));
}

/// The state directory was restored from a backup while the VM ran.
#[test]
fn change_disk_open_in_unrecorded_qemu_is_refused() {
    let Some(host) = Host::new() else { return };
    let (vm, disk) = (host.booted_vm(), host.disk());
    let store = host.store();
    let older = (host.record(&vm), store.read::<DiskRecord>(&disk).unwrap().unwrap());
    host.ok("attach_disk", &json!([vm, disk]));
    store.write(&older.0).unwrap();
    store.write(&older.1).unwrap();
    for (method, arguments) in [
        ("resize_disk", json!([disk, 16])),
        ("update_disk", json!([disk, 8, {"format": "raw"}])),
        ("snapshot_disk", json!([disk, {}])),
        ("delete_disk", json!([disk])),
    ] {
        let refused = host.call(method, &arguments);
        let image = image(&host, &disk);
        assert!(
            refused.failure().message.contains("is open in a QEMU that no record names"),
            "{method}: {refused:?}"
        );
        assert!(
            image.exists()
                && store.read::<DiskRecord>(&disk).unwrap().unwrap().phase == Phase::Ready,
            "{method}"
        );
    }
    // attach_disk asks QEMU, finds the disk plugged in and corrects the records.
    host.ok("attach_disk", &json!([vm, disk]));
    host.ok("detach_disk", &json!([vm, disk]));
    host.ok("resize_disk", &json!([disk, 16]));
}

#[test]
fn detach_unknown_disk_leaves_nothing() {
    let Some(host) = Host::with(json!({"deadlines": {"detach_disk": 1}})) else { return };
    let (vm, disk) = (host.vm(&host.stemcell()), DiskCid::random());
    let work = host.store().lock(Rank::Vm, &vm, Instant::now()).unwrap();
    let late = host.call("detach_disk", &json!([vm, disk]));
    assert!(late.failure().message.contains(vm.as_str()), "{late:?}");
    drop(work);
    let left = host.leaks();
    assert!(left.iter().all(|left| !left.contains(disk.as_str())), "{left:?}");
}

#[test]
fn attach_and_detach_disk_during_boot_succeed() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let disk = host.disk();
    for _ in 0..3 {
        let vm = host.vm(&stemcell);
        assert_eq!(*attach(&host, &vm, &disk).result(), hint(&disk));
        host.ok("detach_disk", &json!([vm, disk]));
        assert!(!is_plugged(&host, &vm, &disk));
        host.ok("delete_vm", &json!([vm]));
    }
}

#[test]
fn attach_disk_to_stopped_vm_plugs_it_at_boot() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    host.power_off(&vm);
    let (kept, released) = (host.disk(), host.disk());
    for disk in [&kept, &released] {
        assert_eq!(*attach(&host, &vm, disk).result(), hint(disk));
    }
    host.ok("detach_disk", &json!([vm, released]));
    assert!(host.qemu(&vm).is_none());
    host.ok("reboot_vm", &json!([vm]));
    assert!(is_plugged(&host, &vm, &kept) && !is_plugged(&host, &vm, &released));
    let words = command_line(&host.qemu(&vm).unwrap());
    let serials = json_options(&words, "-device")
        .into_iter()
        .filter(|device| device["serial"] == kept.as_str())
        .count();
    assert_eq!(serials, 1);
    // A disk that was plugged in at boot can be unplugged.
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
    host.ok("detach_disk", &json!([vm, kept]));
    assert!(!is_plugged(&host, &vm, &kept));
}

#[test]
fn attach_seventeenth_disk_is_refused() {
    let Some(host) = Host::with(json!({"qemu": {"hotplug_slots": 16}})) else { return };
    let vm = host.booted_vm();
    let disks: Vec<_> = (0..17).map(|_| host.disk()).collect();
    for disk in &disks[..16] {
        assert_eq!(*attach(&host, &vm, disk).result(), hint(disk));
    }
    let refused = attach(&host, &vm, &disks[16]);
    assert_eq!(refused.failure().kind, "NotSupported");
    assert!(refused.failure().message.contains("all 16 disk slots of VM"), "{refused:?}");
    assert!(refused.failure().message.contains("extra_disks_slots"), "{refused:?}");
    assert_eq!(host.ok("get_disks", &json!([vm])), json!(disks[..16]));
    let record = fs::read_to_string(host.store().disk_dir(&disks[16]).join("disk.json")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&record).unwrap()["vm"], Value::Null);
    host.ok("detach_disk", &json!([vm, disks[5]]));
    assert_eq!(*attach(&host, &vm, &disks[16]).result(), hint(&disks[16]));
    host.ok("reboot_vm", &json!([vm]));
    let attached: Vec<_> = disks.iter().filter(|disk| **disk != disks[5]).collect();
    assert_eq!(host.ok("get_disks", &json!([vm])), json!(attached));
    assert!(attached.iter().all(|disk| is_plugged(&host, &vm, disk)));
}

#[test]
fn attach_disk_with_iops_limits_it_before_and_after_reboot() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let disk: DiskCid =
        text(&host.ok("create_disk", &json!([8, {"iops": 100}, null]))).parse().unwrap();
    let limited = || {
        let devices = host.qmp(&vm, "query-block", &json!({})).unwrap();
        let devices = devices.as_array().unwrap().iter();
        let mut inserted = devices.map(|device| &device["inserted"]);
        let is_disk = |inserted: &&Value| inserted["node-name"] == disk.as_str();
        inserted.find(is_disk).expect("plugged in")["iops"] == 100
    };
    attach(&host, &vm, &disk).result();
    assert!(limited());
    host.ok("reboot_vm", &json!([vm]));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
    assert!(limited());
}

#[test]
fn attach_or_delete_disk_of_another_vm_is_refused() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let (one, other, disk) = (host.vm(&stemcell), host.vm(&stemcell), host.disk());
    attach(&host, &one, &disk).result();
    for refused in [attach(&host, &other, &disk), host.call("delete_disk", &json!([disk]))] {
        assert_eq!(refused.failure().kind, "CloudError");
        assert!(
            refused.failure().message.contains(&format!("is attached to VM '{one}'")),
            "{refused:?}"
        );
    }
    host.ok("detach_disk", &json!([other, disk]));
    assert!(is_plugged(&host, &one, &disk), "detach from another VM has no effect");
    assert_eq!(host.ok("get_disks", &json!([one])), json!([disk]));
}

#[test]
fn change_disk_of_half_deleted_vm_is_refused_while_it_runs() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let disk = host.disk();
    write_data(&host, &disk);
    host.ok("attach_disk", &json!([vm, disk]));
    let (supervisor, qemu) = (host.supervisor(&vm).unwrap(), host.qemu(&vm).unwrap());
    host.store().write(&VmRecord { phase: Phase::Deleting, ..host.record(&vm) }).unwrap();
    for (method, arguments) in [("resize_disk", json!([disk, 9])), ("delete_disk", json!([disk]))] {
        let refused = host.call(method, &arguments);
        let message = &refused.failure().message;
        assert!(
            message.contains(vm.as_str()) && message.contains("Hint: repeat delete_vm"),
            "{refused:?}"
        );
    }
    for process in [supervisor, qemu] {
        process.signal(nix::sys::signal::Signal::SIGKILL).unwrap();
        wait_for_exit(&process);
    }
    host.ok("resize_disk", &json!([disk, 9]));
    let other = host.vm(&host.stemcell());
    attach(&host, &other, &disk).result();
    host.ok("delete_vm", &json!([vm]));
    assert_eq!(disk_in_qemu(&host, &other, &disk), (true, 2, 1));
    host.ok("detach_disk", &json!([other, disk]));
    assert_data(&host, &disk);
}

#[test]
fn delete_vm_keeps_the_data_of_its_disks() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let (vm, disk) = (host.vm(&stemcell), host.disk());
    write_data(&host, &disk);
    attach(&host, &vm, &disk).result();
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    host.ok("delete_vm", &json!([vm]));
    assert_data(&host, &disk);
    let second = host.vm(&stemcell);
    assert_eq!(*attach(&host, &second, &disk).result(), hint(&disk));
    host.wait_for_console(&second, "BOOTSECTOR-OK", 1);
    host.kill_qemu(&second);
    host.ok("delete_vm", &json!([second]));
    assert_data(&host, &disk);
    assert_eq!(host.ok("has_disk", &json!([disk])), true);
}

#[test]
fn attach_disk_to_two_vms_concurrently_succeeds_once() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let vms = [host.vm(&stemcell), host.vm(&stemcell)];
    let disk = host.disk();
    for vm in &vms {
        host.wait_for_console(vm, "BOOTSECTOR-OK", 1);
    }
    for _ in 0..5 {
        let answers = std::thread::scope(|scope| {
            let calls = vms.each_ref().map(|vm| scope.spawn(|| attach(&host, vm, &disk)));
            calls.map(|call| call.join().unwrap())
        });
        let winner = usize::from(answers[0].outcome.is_err());
        assert_eq!(*answers[winner].result(), hint(&disk));
        let lost = answers[1 - winner].failure();
        assert!(lost.message.contains(&format!("is attached to VM '{}'", vms[winner])), "{lost:?}");
        assert!(
            is_plugged(&host, &vms[winner], &disk) && !is_plugged(&host, &vms[1 - winner], &disk)
        );
        assert_eq!(host.ok("get_disks", &json!([vms[1 - winner]])), json!([]));
        host.ok("detach_disk", &json!([vms[winner], disk]));
    }
}

#[test]
fn detach_disk_from_unresponsive_guest_fails_and_keeps_it_attached() {
    let Some(host) = Host::with(json!({"deadlines": {"detach_disk": 7}})) else { return };
    let vm = host.vm(&host.import(MUTE_GUEST));
    let disk = host.disk();
    write_data(&host, &disk);
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    attach(&host, &vm, &disk).result();
    host.wait_for_console(&vm, "\nU", 1);
    let began = Instant::now();
    let refused = host.call("detach_disk", &json!([vm, disk]));
    assert_eq!(refused.failure().kind, "CloudError", "{refused:?}");
    assert!((2..20).contains(&began.elapsed().as_secs()), "{:?}: {refused:?}", began.elapsed());
    assert!(refused.failure().message.contains("the disk stays attached"), "{refused:?}");
    assert!(is_plugged(&host, &vm, &disk));
    assert_eq!(host.ok("get_disks", &json!([vm])), json!([disk]));
    // attach_disk cannot succeed, because the guest may still eject the disk after it has mounted
    // it again.
    let refused = attach(&host, &vm, &disk);
    assert!(refused.failure().message.contains("finish an earlier detach"), "{refused:?}");
    let refused = host.call("delete_disk", &json!([disk]));
    assert!(refused.failure().message.contains("is attached"), "{refused:?}");

    host.ok("delete_vm", &json!([vm]));
    assert_data(&host, &disk);
    let other = host.booted_vm();
    attach(&host, &other, &disk).result();
    host.ok("detach_disk", &json!([other, disk]));
}

/// Kills `method` at 20 moments of its duration. Each time, repeats it and reverts it with `back`.
fn assert_repeatable_after_kills(host: &Host, method: &str, back: &str) {
    let vm = host.booted_vm();
    let disk = host.disk();
    write_data(host, &disk);
    let both = json!([vm, disk]);
    if back == "attach_disk" {
        host.ok(back, &both);
    }
    let began = Instant::now();
    host.ok(method, &both);
    let duration = began.elapsed();
    for step in 0..20 {
        host.ok(back, &both);
        let mut call = host.start(method, &both);
        std::thread::sleep(duration * step / 20);
        call.kill().unwrap();
        call.wait().unwrap();
        // get_disks answers in between.
        host.ok("get_disks", &json!([vm]));
        host.ok(method, &both);
        let attached = method == "attach_disk";
        assert_eq!(
            host.ok("get_disks", &json!([vm])),
            if attached { json!([disk]) } else { json!([]) }
        );
        assert_eq!(
            is_plugged(host, &vm, &disk),
            attached,
            "killed after {step}/20 of {duration:?}"
        );
        let sets = host.qmp(&vm, "query-fdsets", &json!({})).unwrap().to_string();
        assert_eq!(sets.matches(&format!("rdwr:{disk}")).count(), usize::from(attached), "{sets}");
    }
    host.ok("delete_vm", &json!([vm]));
    assert_data(host, &disk);
}

#[test]
fn attach_disk_killed_at_any_moment_can_be_repeated() {
    let Some(host) = Host::new() else { return };
    assert_repeatable_after_kills(&host, "attach_disk", "detach_disk");
}

#[test]
fn detach_disk_killed_at_any_moment_can_be_repeated() {
    let Some(host) = Host::new() else { return };
    assert_repeatable_after_kills(&host, "detach_disk", "attach_disk");
}

#[test]
fn attach_disk_after_killed_attach_to_another_vm_leaves_one_owner() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let (one, other, disk) = (host.vm(&stemcell), host.vm(&stemcell), host.disk());
    let both = [&one, &other];
    for vm in both {
        host.wait_for_console(vm, "BOOTSECTOR-OK", 1);
    }
    for step in 0..10 {
        let mut call = host.start("attach_disk", &json!([one, disk]));
        std::thread::sleep(Duration::from_millis(step * 8));
        call.kill().unwrap();
        call.wait().unwrap();
        let answer = attach(&host, &other, &disk);
        let holders: Vec<_> = both.into_iter().filter(|vm| is_plugged(&host, vm, &disk)).collect();
        let wanted = if answer.outcome.is_ok() { &other } else { &one };
        assert_eq!(holders, [wanted], "{answer:?}");
        host.ok("detach_disk", &json!([wanted, disk]));
    }
}
