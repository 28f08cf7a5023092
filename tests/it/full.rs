//! A full filesystem: guests wait and go on, calls say so and leave nothing.

use std::time::Instant;

use bosh_qemu_cpi::cid::{Cid, DiskCid, VmCid};
use bosh_qemu_cpi::store::record::DiskImage;
use bosh_qemu_cpi::store::{DiskRecord, Phase, Rank, SnapshotRecord};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::disks::in_qemu;
use crate::support::host::{Host, WRITING_GUEST, gone, text, vm_cid};
use crate::support::images::{image, qemu_io, record};
use crate::vm_list::answering;

/// A VM whose guest has filled the filesystem of `host` and waits.
fn waiting_vm(host: &Host) -> VmCid {
    let mut arguments = host.vm_arguments(&host.import(WRITING_GUEST));
    arguments[2]["root_disk"] = json!(64);
    let vm = vm_cid(&host.ok("create_vm", &arguments));
    host.event(&vm, "BLOCK_IO_ERROR", 1);
    host.event(&vm, "STOP", 1);
    vm
}

#[test]
fn a_guest_waits_for_room_and_goes_on() {
    let Some(host) = Host::on_small_filesystem(24) else { return };
    let vm = waiting_vm(&host);
    let listed = answering(&host);
    assert_eq!(listed[0]["state"], "paused");
    assert_eq!(listed[0]["reason"], "io-error on root (no space)");
    assert_eq!(host.ok("has_vm", &json!([vm])), true);
    assert_eq!(host.ok("get_disks", &json!([vm])), json!([]));
    let written = |host: &Host| {
        std::fs::read_to_string(host.paths(&vm).console_log()).unwrap().matches("W").count()
    };
    let before = written(&host);
    assert!(before > 10);

    host.small().grow(128);
    host.event(&vm, "resumed", 1);
    host.sees(&vm, "END", 1);
    // One for each 64 KiB of the disk but for the first.
    assert_eq!(written(&host), 1023);
    assert_eq!(answering(&host)[0]["state"], "running");
}

/// Its supervisor died while it waited: the next one did not see why.
#[test]
fn a_guest_that_waits_for_room_goes_on_under_another_supervisor() {
    let Some(host) = Host::on_small_filesystem(24) else { return };
    let vm = waiting_vm(&host);
    let supervisor = host.supervisor(&vm).expect("a supervisor");
    supervisor.signal(Signal::SIGKILL).unwrap();
    gone(&supervisor);
    // Some room, but not what is taken for it: a record can be written, the guest waits on.
    host.small().grow(26);
    host.ok("set_vm_metadata", &json!([vm, {}]));
    host.event(&vm, "adopted", 1);
    assert_eq!(answering(&host)[0]["reason"], "io-error on root (no space)");
    host.small().grow(128);
    host.event(&vm, "resumed", 1);
    host.sees(&vm, "END", 1);
}

#[test]
fn a_guest_that_waits_for_room_is_not_waited_for_at_a_reboot() {
    let Some(host) = Host::on_small_filesystem(24) else { return };
    let vm = waiting_vm(&host);
    host.small().grow(26);
    let began = std::time::Instant::now();
    host.ok("reboot_vm", &json!([vm]));
    assert!(began.elapsed().as_secs() < 30, "{:?}", began.elapsed());
    host.sees(&vm, "BOOTSECTOR-OK", 2);
}

#[test]
fn a_guest_that_waits_for_room_can_be_deleted() {
    let Some(host) = Host::on_small_filesystem(24) else { return };
    let vm = waiting_vm(&host);
    host.ok("delete_vm", &json!([vm]));
    assert_eq!(host.ok("has_vm", &json!([vm])), false);
}

/// Calls `method` with no page of the filesystem free, then five, and so on until it succeeds. Each failure says that there
/// is no space and leaves what there was. The result, and how often it failed.
fn with_ever_more_room(host: &Host, method: &str, arguments: &Value) -> (Value, u64) {
    let quiet = || {
        let mut left = host.left();
        left.retain(|what| what != "ballast");
        left
    };
    // Who has the disk, by the VM's record and by its QEMU.
    let holds = || {
        let vm: VmCid = text(&arguments[0]).parse().unwrap();
        let nodes = host
            .qemu(&vm)
            .map(|_| host.qmp(&vm, "query-named-block-nodes", &json!({"flat": true})).unwrap());
        let in_qemu = nodes.is_some_and(|nodes| nodes.to_string().contains(&text(&arguments[1])));
        (host.ok("get_disks", &json!([vm])), in_qemu)
    };
    let holds = || matches!(method, "attach_disk" | "detach_disk").then(holds);
    let before = (quiet(), holds());
    for free in (0..1000).step_by(5) {
        host.small().fill(free);
        match host.call(method, arguments).outcome {
            Ok(result) => {
                host.small().empty();
                return (result, free);
            }
            Err(failure) => {
                assert_eq!(failure.kind, "NoDiskSpace", "with {free} pages: {failure:?}");
                assert_eq!((quiet(), holds()), before, "with {free} pages free");
            }
        }
    }
    panic!("{method} does not succeed with 4 MB");
}

#[test]
fn calls_that_meet_a_full_filesystem_say_so_and_leave_nothing() {
    let Some(host) = Host::on_small_filesystem(24) else { return };
    let stemcell = host.stemcell();
    let image = host.path("image");
    let bystander = host.vm(&stemcell);
    host.sees(&bystander, "BOOTSECTOR-OK", 1);
    let mut table = Vec::new();
    let mut walk = |method: &'static str, arguments: Value| {
        let (result, failures) = with_ever_more_room(&host, method, &arguments);
        table.push((method, failures));
        result
    };
    walk("create_stemcell", json!([image, {}]));
    let disk = walk("create_disk", json!([8, {}, null]));
    walk("resize_disk", json!([disk, 9]));
    walk("snapshot_disk", json!([disk, {}]));
    walk("update_disk", json!([disk, 9, {"format": "raw"}]));
    walk("set_disk_metadata", json!([disk, {"owner": "x".repeat(5000)}]));
    let cid = text(&disk).parse().unwrap();
    assert_eq!(in_qemu(&host, &bystander, &cid), (false, 0, 0));
    walk("attach_disk", json!([bystander, disk]));
    assert_eq!(in_qemu(&host, &bystander, &cid), (true, 2, 1));
    assert_eq!(host.ok("get_disks", &json!([bystander])), json!([disk]));
    walk("resize_disk", json!([disk, 10]));
    walk("snapshot_disk", json!([disk, {}]));
    walk("update_disk", json!([disk, 10, {"format": "qcow2"}]));
    assert!(in_qemu(&host, &bystander, &cid).0, "its nodes have another name now");
    let second = walk("create_disk", json!([8, {}, null]));
    walk("attach_disk", json!([bystander, second]));
    assert_eq!(host.ok("get_disks", &json!([bystander])), json!([disk, second]));
    for (gone, left) in [(&disk, json!([second])), (&second, json!([]))] {
        walk("detach_disk", json!([bystander, gone]));
        let cid = text(gone).parse().unwrap();
        assert_eq!(in_qemu(&host, &bystander, &cid), (false, 0, 0));
        assert_eq!(host.ok("get_disks", &json!([bystander])), left);
        assert_eq!(record(&host, &cid).vm, None);
    }
    walk("create_vm", host.vm_arguments(&stemcell));
    host.ok("attach_disk", &json!([bystander, disk]));
    host.power_off(&bystander);
    walk("detach_disk", json!([bystander, disk]));
    assert_eq!(record(&host, &cid).vm, None);
    assert!(table.iter().all(|(_, failures)| *failures > 0), "{table:?}");
}

#[test]
fn room_that_a_copy_at_work_will_take_is_given_to_nobody_else() {
    let Some(host) = Host::on_small_filesystem(64) else { return };
    let [first, second] = [0, 1].map(|_| -> DiskCid {
        let disk =
            text(&host.ok("create_disk", &json!([8, {"format": "raw"}, null]))).parse().unwrap();
        qemu_io(&host, &image(&host, &disk), &record(&host, &disk), &["write -P 7 0 8M"]);
        disk
    });
    let noted = |cid: &str| std::fs::write(host.store().pending_dir().join(cid), "").unwrap();
    // For one copy, but not for two.
    let has_room = |wanted: bool| {
        host.small().fill((12 << 20) / 4096);
        let outcome = host.call("snapshot_disk", &json!([second, {}])).outcome;
        host.small().empty();
        match outcome {
            Ok(snapshot) => {
                assert!(wanted && host.ok("delete_snapshot", &json!([snapshot])).is_null())
            }
            Err(failure) => assert!(!wanted && failure.kind == "NoDiskSpace", "{failure:?}"),
        }
    };
    // As a snapshot_disk of the first has it before it has copied anything.
    let whole = host.ok("snapshot_disk", &json!([first, {}]));
    let whole =
        host.store().read::<SnapshotRecord>(&text(&whole).parse().unwrap()).unwrap().unwrap();
    host.ok("delete_snapshot", &json!([whole.cid]));
    let half = SnapshotRecord { phase: Phase::Creating, ..whole };
    let work = host.store().lock(Rank::Snapshot, &half.cid, Instant::now()).unwrap();
    noted(half.cid.as_str());
    host.store().write(&half).unwrap();
    has_room(false);
    drop(work);
    has_room(true);
    // As an update_disk has it.
    let disk = record(&host, &first);
    let copy = DiskImage { generation: 1, ..disk.current() };
    let work = host.store().lock(Rank::Disk, &first, Instant::now()).unwrap();
    noted(first.as_str());
    host.store().write(&DiskRecord { inactive_image: Some(copy), ..disk }).unwrap();
    has_room(false);
    drop(work);
    has_room(true);
}

#[test]
fn what_makes_room_needs_none() {
    let Some(host) = Host::on_small_filesystem(24) else { return };
    let vm = host.booted_vm();
    let disk = host.disk();
    let stemcells = host.store().list::<bosh_qemu_cpi::store::record::StemcellRecord>().unwrap();
    host.small().fill(0);
    host.ok("delete_vm", &json!([vm]));
    host.small().fill(0);
    host.ok("delete_disk", &json!([disk]));
    host.small().fill(0);
    host.ok("delete_stemcell", &json!([stemcells[0]]));
    host.small().empty();
}
