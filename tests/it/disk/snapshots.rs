//! snapshot_disk, delete_snapshot and `disk restore`: a snapshot holds the data of one moment,
//! independently of its disk.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Child;

use bosh_qemu_cpi::cid::{Cid, DiskCid, SnapshotCid, VmCid};
use bosh_qemu_cpi::store::{Phase, SnapshotRecord};
use bosh_qemu_cpi::sys::pidfd::Process;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::answer::{Answer, Failure};
use crate::support::filesystem::Filesystem;
use crate::support::host::{Host, eventually, text};
use crate::support::images::{
    assert_pattern, assert_pattern_in, guest_writes, image, qemu_io, qemu_objects, record,
    write_pattern,
};

const METADATA: &str = r#"{"deployment": "dep", "job": "web", "index": 0, "agent_id": "a"}"#;

fn disk(host: &Host, properties: &Value) -> DiskCid {
    text(&host.ok("create_disk", &json!([8, properties, null]))).parse().unwrap()
}

fn snapshot(host: &Host, disk: &DiskCid) -> SnapshotCid {
    let metadata: Value = serde_json::from_str(METADATA).unwrap();
    text(&host.ok("snapshot_disk", &json!([disk, metadata]))).parse().unwrap()
}

fn snapshot_record(host: &Host, snapshot: &SnapshotCid) -> SnapshotRecord {
    host.store().read::<SnapshotRecord>(snapshot).unwrap().expect("a record")
}

fn snapshot_image(host: &Host, snapshot: &SnapshotCid) -> PathBuf {
    host.store().snapshot_image(&snapshot_record(host, snapshot)).unwrap()
}

fn restore(host: &Host, snapshot: &SnapshotCid) -> DiskCid {
    let output = host.cpi().args(["disk", "restore", snapshot.as_str()]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

#[test]
fn snapshot_disk_keeps_the_data_of_that_moment() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    for properties in [
        json!({}),
        json!({"format": "raw", "iops": 500}),
        json!({"encrypted": true}),
        json!({"format": "raw", "encrypted": true}),
    ] {
        let disk = disk(&host, &properties);
        write_pattern(&host, &disk);
        let detached = snapshot(&host, &disk);
        host.ok("attach_disk", &json!([vm, disk]));
        let attached = snapshot(&host, &disk);
        assert_eq!(qemu_objects(&host, &vm, "snap-"), [0; 3], "{properties}");
        assert_eq!(qemu_objects(&host, &vm, disk.as_str()), [0, 2, 1], "{properties}");
        guest_writes(&host, &vm, &disk, "write -P 0x99 0 6M");
        host.ok("detach_disk", &json!([vm, disk]));
        qemu_io(&host, &image(&host, &disk), &record(&host, &disk), &["read -P 0x99 0 6M"]);
        host.ok("delete_disk", &json!([disk]));

        for snapshot in [&detached, &attached] {
            let of = snapshot_record(&host, snapshot);
            assert_eq!(of.disk.cid, disk);
            assert_eq!(json!(of.metadata), serde_json::from_str::<Value>(METADATA).unwrap());
            let made = of.disk.with_image(&of.image());
            assert_pattern_in(&host, &snapshot_image(&host, snapshot), &made);
            let restored = restore(&host, snapshot);
            assert_ne!(restored, disk);
            assert_pattern(&host, &restored);
            let is = record(&host, &restored);
            assert_eq!(
                (is.size.get(), is.encrypted, is.vm),
                (8, properties["encrypted"] == true, None)
            );
            assert_eq!(json!(is.cloud_properties), properties);
            host.ok("attach_disk", &json!([vm, restored]));
            host.ok("delete_snapshot", &json!([snapshot]));
            host.ok("delete_snapshot", &json!([snapshot]));
            host.ok("detach_disk", &json!([vm, restored]));
            assert_pattern(&host, &restored);
            host.ok("delete_disk", &json!([restored]));
        }
    }
    assert_eq!(
        host.call("snapshot_disk", &json!([DiskCid::random(), {}])).failure().kind,
        "DiskNotFound"
    );
    let output = host.cpi().args(["disk", "restore", "snap-unknown"]).output().unwrap();
    assert!(!output.status.success() && output.stdout.is_empty());
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("there is no snapshot 'snap-unknown'"),
        "{output:?}"
    );
}

#[test]
fn snapshot_disk_that_is_sparse_stays_sparse() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let disk: DiskCid =
        text(&host.ok("create_disk", &json!([64 << 10, {"format": "raw"}, null]))).parse().unwrap();
    write_pattern(&host, &disk);
    host.ok("attach_disk", &json!([vm, disk]));
    let snapshot = snapshot(&host, &disk);
    host.ok("detach_disk", &json!([vm, disk]));
    let other = self::snapshot(&host, &disk);
    let restored = restore(&host, &snapshot);
    assert_eq!(record(&host, &restored).format, record(&host, &disk).format);
    for path in
        [snapshot_image(&host, &snapshot), snapshot_image(&host, &other), image(&host, &restored)]
    {
        let blocks = fs::metadata(&path).unwrap().blocks();
        assert!(blocks * 512 < 16 << 20, "{}: {blocks} blocks", path.display());
    }
}

/// A VM with an attached disk of `mib` MiB, completely written.
fn full_disk(host: &Host, stemcell: &str, mib: u64) -> (VmCid, DiskCid) {
    let vm = host.vm(stemcell);
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    let disk: DiskCid =
        text(&host.ok("create_disk", &json!([mib, {"format": "raw"}, null]))).parse().unwrap();
    qemu_io(host, &image(host, &disk), &record(host, &disk), &[&format!("write -P 7 0 {mib}M")]);
    host.ok("attach_disk", &json!([vm, disk]));
    (vm, disk)
}

/// Starts `method` and throttles its block job as soon as QEMU's monitor is free.
fn start_throttled(host: &Host, vm: &VmCid, method: &str, arguments: &Value) -> Child {
    let call = host.start(method, arguments);
    eventually("the job has begun", || {
        let jobs = host.qmp(vm, "query-jobs", &json!({})).ok()?;
        let id = jobs[0]["id"].as_str()?.to_owned();
        host.qmp(vm, "block-job-set-speed", &json!({"device": id, "speed": 65536})).ok()
    });
    call
}

/// Error of a call that must fail.
fn failure(call: Child) -> Failure {
    Answer::of(&call.wait_with_output().unwrap()).failure().clone()
}

/// Asserts that neither the store nor QEMU has anything but the VM's disk.
fn assert_no_copy_left(host: &Host, vm: &VmCid, disk: &DiskCid) {
    assert!(host.store().list::<SnapshotRecord>().unwrap().is_empty());
    assert_eq!(qemu_objects(host, vm, "snap-"), [0; 3]);
    assert_eq!(qemu_objects(host, vm, disk.as_str()), [0, 2, 1]);
    assert_eq!(record(host, disk).inactive_image, None);
    assert!(host.leaks().iter().all(|left| !left.contains("snap-")), "{:?}", host.leaks());
}

#[test]
fn interrupt_copy_of_attached_disk_leaves_nothing() {
    let Some(host) = Host::with(json!({"restart": "never"})) else { return };
    let stemcell = host.stemcell();
    // Large enough that a copy takes seconds.
    let (vm, disk) = full_disk(&host, &stemcell, 1536);
    for (method, arguments) in
        [("snapshot_disk", json!([disk, {}])), ("update_disk", json!([disk, 1536, {}]))]
    {
        let mut call = start_throttled(&host, &vm, method, &arguments);
        for (other, arguments) in
            [("resize_disk", json!([disk, 2048])), ("update_disk", json!([disk, 2048, {}]))]
        {
            let refused = host.call(other, &arguments);
            assert!(refused.failure().message.contains("is being copied"), "{refused:?}");
        }
        // Another disk can be attached and detached.
        let second = host.disk();
        host.ok("attach_disk", &json!([vm, second]));
        host.ok("detach_disk", &json!([vm, second]));
        host.ok("delete_disk", &json!([second]));
        call.kill().unwrap();
        call.wait().unwrap();
        host.ok("resize_disk", &json!([disk, 1536]));
        assert_no_copy_left(&host, &vm, &disk);

        host.reconfigure(|config| config["deadlines"] = json!({method: 6}));
        let late = failure(start_throttled(&host, &vm, method, &arguments));
        assert!(late.message.contains("at its deadline"), "{late:?}");
        assert_no_copy_left(&host, &vm, &disk);
        host.reconfigure(|config| config["deadlines"] = json!({}));
    }
    let ended = format!("VM '{vm}' ended while its disk was copied");
    let call = start_throttled(&host, &vm, "snapshot_disk", &json!([disk, {}]));
    host.kill_qemu(&vm);
    let message = failure(call).message;
    assert!(message.contains(&ended), "{message}");
    host.ok("reboot_vm", &json!([vm]));
    assert_no_copy_left(&host, &vm, &disk);
    let call = start_throttled(&host, &vm, "update_disk", &json!([disk, 1536, {}]));
    host.ok("delete_vm", &json!([vm]));
    let message = failure(call).message;
    assert!(message.contains(&ended), "{message}");
    assert_eq!(
        (record(&host, &disk).inactive_image, record(&host, &disk).image()),
        (None, "disk.raw".to_owned())
    );
    qemu_io(&host, &image(&host, &disk), &record(&host, &disk), &["read -P 7 0 1536M"]);
}

/// Starts a call that copies a disk of a stopped VM and stops the process in the middle of the
/// copy, whose path `copy` returns. The caller must continue the process with SIGCONT.
fn start_and_stop(
    host: &Host,
    method: &str,
    arguments: &Value,
    copy: impl Fn() -> Option<PathBuf>,
) -> (Child, Process) {
    let call = host.start(method, arguments);
    let process = Process::open(call.id() as i32).unwrap();
    eventually("data is copied", || (fs::metadata(copy()?).ok()?.blocks() > 1 << 11).then_some(()));
    process.signal(Signal::SIGSTOP).unwrap();
    assert!(copy().is_some(), "the copy is unfinished");
    (call, process)
}

/// Path of the copy of a snapshot_disk that is running.
fn half_snapshot(host: &Host) -> Option<PathBuf> {
    let half = host.store().list::<SnapshotRecord>().unwrap().pop()?;
    let half = host.store().read::<SnapshotRecord>(&half).ok()??;
    (half.phase == Phase::Creating).then(|| host.store().snapshot_image(&half).unwrap())
}

#[test]
fn reboot_vm_during_copy_of_its_disk_does_not_wait() {
    let deadlines = json!({"reboot_vm": 30, "delete_vm": 30, "detach_disk": 2, "delete_disk": 2});
    let Some(host) = Host::with(json!({"deadlines": deadlines})) else { return };
    let (vm, disk) = full_disk(&host, &host.stemcell(), 256);
    // Calls on the disk wait and name the copy.
    let waits = |copy: &str| {
        for (method, arguments) in
            [("detach_disk", json!([vm, disk])), ("delete_disk", json!([disk]))]
        {
            let refused = host.call(method, &arguments);
            assert!(
                refused.failure().message.contains(&format!("is being copied {copy}")),
                "{refused:?}"
            );
        }
    };
    host.power_off(&vm);
    let snapshot =
        || start_and_stop(&host, "snapshot_disk", &json!([disk, {}]), || half_snapshot(&host));
    let (call, process) = snapshot();
    waits("into snapshot 'snap-");
    host.ok("reboot_vm", &json!([vm]));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
    guest_writes(&host, &vm, &disk, "write -P 9 0 64k");
    process.signal(Signal::SIGCONT).unwrap();
    let message = failure(call).message;
    assert!(
        message.contains("was written to while it was copied")
            && message.contains("its VM was started"),
        "{message}"
    );
    assert_no_copy_left(&host, &vm, &disk);

    host.power_off(&vm);
    let half_copy = || {
        let copy = record(&host, &disk).inactive_image?;
        Some(host.store().disk_image_at(&disk, &copy).unwrap())
    };
    let (call, process) = start_and_stop(&host, "update_disk", &json!([disk, 256, {}]), half_copy);
    waits("by update_disk");
    host.ok("reboot_vm", &json!([vm]));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 3);
    process.signal(Signal::SIGCONT).unwrap();
    let message = failure(call).message;
    assert!(
        message.contains(&format!("VM '{vm}' was started while the disk was copied")),
        "{message}"
    );
    assert_no_copy_left(&host, &vm, &disk);
    assert_eq!(record(&host, &disk).image(), "disk.raw");

    host.power_off(&vm);
    let (call, process) = snapshot();
    host.ok("delete_vm", &json!([vm]));
    process.signal(Signal::SIGCONT).unwrap();
    let made: SnapshotCid =
        text(Answer::of(&call.wait_with_output().unwrap()).result()).parse().unwrap();
    let of = snapshot_record(&host, &made);
    qemu_io(
        &host,
        &snapshot_image(&host, &made),
        &of.disk,
        &["read -P 9 0 64k", "read -P 7 64k 255M"],
    );
}

#[test]
fn resize_disk_with_unremovable_half_snapshot_names_it() {
    let Some(host) = Host::new() else { return };
    let disk = disk(&host, &json!({}));
    let snapshot = snapshot(&host, &disk);
    let whole = snapshot_record(&host, &snapshot);
    let mut half = SnapshotRecord { phase: Phase::Creating, ..whole.clone() };
    half.disk.pool = Some("gone".into());
    host.store().write(&half).unwrap();
    let note = host.store().pending_dir().join(snapshot.as_str());
    fs::write(&note, "").unwrap();
    let refused = host.call("resize_disk", &json!([disk, 9]));
    let message = &refused.failure().message;
    assert!(message.contains(snapshot.as_str()) && message.contains("'gone'"), "{message}");
    assert!(!message.contains("is being copied"), "{message}");
    host.store().write(&SnapshotRecord { phase: Phase::Creating, ..whole }).unwrap();
    host.ok("resize_disk", &json!([disk, 9]));
    assert!(host.store().list::<SnapshotRecord>().unwrap().is_empty() && !note.exists());
}

#[test]
fn snapshot_disk_on_reflink_filesystem_shares_blocks() {
    let Some(pool) = Filesystem::sharing(512) else { return };
    let Some(host) = Host::with(json!({"pools": {"shares": {"path": pool.path()}}})) else {
        return;
    };
    let disk =
        text(&host.ok("create_disk", &json!([64, {"pool": "shares", "format": "raw"}, null])));
    let cid: DiskCid = disk.parse().unwrap();
    write_pattern(&host, &cid);
    qemu_io(&host, &image(&host, &cid), &record(&host, &cid), &["write -P 7 8M 48M"]);
    let taken = || {
        rustix::fs::sync();
        let has = rustix::fs::statvfs(pool.path()).unwrap();
        ((has.f_blocks - has.f_bfree) * has.f_frsize) >> 20
    };
    let before = taken();
    assert!(before >= 48, "{before} MiB");
    let snapshot = text(&host.ok("snapshot_disk", &json!([disk, {}])));
    let restored = host.cpi().args(["disk", "restore", &snapshot]).output().unwrap();
    let restored = String::from_utf8(restored.stdout).unwrap().trim().to_owned();
    let more = taken() - before;
    assert!(more < 16, "{more} MiB for two copies of 48");
    // A write to one copy does not change the others.
    qemu_io(&host, &image(&host, &cid), &record(&host, &cid), &["write -P 1 0 64M"]);
    let restored: DiskCid = restored.parse().unwrap();
    assert_pattern(&host, &restored);
    host.ok("delete_disk", &json!([disk]));
    assert_pattern(&host, &restored);
}
