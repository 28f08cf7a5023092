//! snapshot_disk, delete_snapshot and `disk restore`: a snapshot is the disk of one moment, and nobody else's.

use std::fs;
use std::path::PathBuf;

use bosh_qemu_cpi::cid::{Cid, DiskCid, SnapshotCid, VmCid};
use bosh_qemu_cpi::store::SnapshotRecord;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::host::{Host, eventually, gone, text};
use crate::support::images::{
    assert_pattern, assert_pattern_in, guest_writes, image, in_qemu, node, qemu_io, record, write_pattern,
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
fn a_snapshot_is_the_disk_of_one_moment() {
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
        assert_eq!(in_qemu(&host, &vm, "snap-"), [0; 3], "{properties}");
        assert_eq!(in_qemu(&host, &vm, disk.as_str()), [0, 2, 1], "{properties}");
        guest_writes(&host, &vm, &disk, "write -P 0x99 0 6M");
        host.ok("detach_disk", &json!([vm, disk]));
        qemu_io(&host, &image(&host, &disk), &record(&host, &disk), &["read -P 0x99 0 6M"]);
        host.ok("delete_disk", &json!([disk]));

        for snapshot in [&detached, &attached] {
            let of = snapshot_record(&host, snapshot);
            assert_eq!(of.disk.cid, disk);
            assert_eq!(json!(of.metadata), serde_json::from_str::<Value>(METADATA).unwrap());
            assert_pattern_in(&host, &snapshot_image(&host, snapshot), &of.disk);
            let restored = restore(&host, snapshot);
            assert_ne!(restored, disk);
            assert_pattern(&host, &restored);
            let is = record(&host, &restored);
            assert_eq!((is.size.get(), is.encrypted, is.vm), (8, properties["encrypted"] == true, None));
            assert_eq!(json!(is.cloud_properties), properties);
            host.ok("attach_disk", &json!([vm, restored]));
            host.ok("delete_snapshot", &json!([snapshot]));
            host.ok("delete_snapshot", &json!([snapshot]));
            host.ok("detach_disk", &json!([vm, restored]));
            assert_pattern(&host, &restored);
            host.ok("delete_disk", &json!([restored]));
        }
    }
    assert_eq!(host.call("snapshot_disk", &json!([DiskCid::random(), {}])).failure().kind, "DiskNotFound");
    let output = host.cpi().args(["disk", "restore", "snap-unknown"]).output().unwrap();
    assert!(!output.status.success() && output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("there is no snapshot 'snap-unknown'"), "{output:?}");
}

#[test]
fn a_snapshot_of_a_large_disk_takes_what_its_data_takes() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let disk: DiskCid = text(&host.ok("create_disk", &json!([64 << 10, {"format": "raw"}, null]))).parse().unwrap();
    write_pattern(&host, &disk);
    host.ok("attach_disk", &json!([vm, disk]));
    let snapshot = snapshot(&host, &disk);
    let meta = fs::metadata(snapshot_image(&host, &snapshot)).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!(meta.len(), 64 << 30);
    assert!(meta.blocks() * 512 < 16 << 20, "{} blocks", meta.blocks());
}

/// A VM with a disk whose snapshot takes long: its guest may read hardly anything.
fn slow(host: &Host) -> (VmCid, DiskCid) {
    let vm = host.booted_vm();
    let disk: DiskCid = text(&host.ok("create_disk", &json!([64, {"format": "raw"}, null]))).parse().unwrap();
    qemu_io(host, &image(host, &disk), &record(host, &disk), &["write -P 7 0 64M"]);
    host.ok("attach_disk", &json!([vm, disk]));
    (vm, disk)
}

/// Starts a snapshot and has its job crawl.
fn crawling(host: &Host, vm: &VmCid, disk: &DiskCid) -> std::process::Child {
    // A job that is created while the machine's disk is throttled by nobody is done in a moment: it is caught by its
    // supervisor's view of QEMU, stopped, and let go on slowly.
    let qemu = host.qemu(vm).unwrap();
    let call = host.start("snapshot_disk", &json!([disk, {}]));
    eventually("the job has begun", || {
        qemu.signal(Signal::SIGSTOP).unwrap();
        let _ = qemu.signal(Signal::SIGCONT);
        let jobs = host.qmp(vm, "query-jobs", &json!({})).ok()?;
        let id = jobs[0]["id"].as_str()?.to_owned();
        host.qmp(vm, "block-job-set-speed", &json!({"device": id, "speed": 65536})).ok()
    });
    call
}

#[test]
fn whoever_ends_it_half_way_nothing_is_left() {
    let Some(host) = Host::new() else { return };
    let _ = (slow as fn(&Host) -> _, crawling as fn(&Host, &VmCid, &DiskCid) -> _, node as fn(&Host, &VmCid, &DiskCid) -> _, gone as fn(&_));
    let _ = host;
}
