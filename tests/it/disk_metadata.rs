//! set_disk_metadata: it waits for nobody who works on the disk, and nothing that it wrote is lost on them.

use std::fs;
use std::process::Child;
use std::time::Instant;

use bosh_qemu_cpi::cid::DiskCid;
use bosh_qemu_cpi::store::{DiskRecord, Phase, Rank, SnapshotRecord};
use serde_json::{Value, json};

use crate::support::answer::Answer;
use crate::support::host::{Host, eventually, text};
use crate::support::images::{assert_pattern, record, write_pattern};

/// A disk's metadata.
pub fn metadata(host: &Host, disk: &DiskCid) -> Value {
    json!(host.store().disk_metadata(&record(host, disk)).unwrap())
}

/// A host whose calls give up soon.
fn hasty_host() -> Option<Host> {
    Host::with(json!({"deadlines": {"set_disk_metadata": 3, "delete_disk": 3}}))
}

#[test]
fn it_waits_for_no_call_on_the_disk() {
    let Some(host) = hasty_host() else { return };
    let disk = host.disk();
    let work = host.store().lock(Rank::Disk, &disk, Instant::now()).unwrap();
    host.ok("set_disk_metadata", &json!([disk, {"owner": "bosh"}]));
    drop(work);
    assert_eq!(metadata(&host, &disk), json!({"owner": "bosh"}));
}

/// Waits until a call waits for a lock.
fn waits_for(call: &Child, lock: &str) {
    eventually("it waits for the lock", || {
        let files = fs::read_dir(format!("/proc/{}/fd", call.id())).ok()?.flatten();
        let mut names = files.filter_map(|file| fs::read_link(file.path()).ok());
        names.find(|name| name.ends_with(lock))
    });
}

#[test]
fn a_copy_of_the_disk_and_its_metadata_do_not_lose_each_other() {
    let Some(host) = hasty_host() else { return };
    let (vm, disk) = (host.booted_vm(), host.disk());
    host.ok("attach_disk", &json!([vm, disk]));
    for (method, arguments) in [
        ("snapshot_disk", json!([disk, {}])),
        ("resize_disk", json!([disk, 16])),
        ("update_disk", json!([disk, 16, {"format": "raw"}])),
    ] {
        host.ok("set_disk_metadata", &json!([disk, {"before": method}]));
        // By now it knows the disk's record, and has the disk's lock.
        let space = host.store().lock(Rank::Space, "all", Instant::now()).unwrap();
        let call = host.start(method, &arguments);
        waits_for(&call, "locks/space.all");
        host.ok("set_disk_metadata", &json!([disk, {"during": method}]));
        drop(space);
        let answer = Answer::of(&call.wait_with_output().unwrap());
        assert_eq!(metadata(&host, &disk), json!({"during": method}));
        if method == "snapshot_disk" {
            let made = text(answer.result()).parse().unwrap();
            let of = host.store().read::<SnapshotRecord>(&made).unwrap().unwrap().disk;
            assert_eq!(json!(of.metadata), json!({"before": method}));
        } else {
            assert_eq!(*answer.result(), Value::Null, "{method}");
        }
    }
    assert_eq!(
        (record(&host, &disk).image().as_str(), record(&host, &disk).size.get()),
        ("disk-1.raw", 16)
    );
}

#[test]
fn a_record_of_the_first_version_has_it_until_it_is_set() {
    let Some(host) = Host::new() else { return };
    let disk = host.disk();
    let old = DiskRecord {
        metadata: json!({"owner": "old"}).as_object().unwrap().clone(),
        ..record(&host, &disk)
    };
    host.store().write(&old).unwrap();
    host.ok("resize_disk", &json!([disk, 9]));
    assert_eq!(metadata(&host, &disk), json!({"owner": "old"}));
    host.ok("set_disk_metadata", &json!([disk, {"job": "new"}]));
    host.ok("resize_disk", &json!([disk, 10]));
    assert_eq!(metadata(&host, &disk), json!({"job": "new"}));
}

#[test]
fn a_disk_that_is_deleted_meanwhile_is_not_found_and_nothing_is_left() {
    let Some(host) = hasty_host() else { return };
    let disk = host.disk();
    write_pattern(&host, &disk);
    let writes = host.store().lock(Rank::Metadata, &disk, Instant::now()).unwrap();
    let waits = host.call("delete_disk", &json!([disk]));
    assert!(waits.failure().message.contains(&format!("metadata.{disk}")), "{waits:?}");
    assert_pattern(&host, &disk);
    assert_eq!(record(&host, &disk).phase, Phase::Ready, "nothing was begun");

    host.reconfigure(|config| config["deadlines"] = json!({}));
    let call = host.start("set_disk_metadata", &json!([disk, {"owner": "late"}]));
    waits_for(&call, &format!("locks/metadata.{disk}"));
    // What delete_disk does once it has the lock.
    host.store().remove::<DiskRecord>(&disk).unwrap();
    writes.unlink().unwrap();
    let late = Answer::of(&call.wait_with_output().unwrap());
    assert_eq!(late.failure().kind, "DiskNotFound");
    host.ok("delete_disk", &json!([disk]));
    host.assert_nothing_left();
}

#[test]
fn metadata_that_can_not_be_read_keeps_nobody_from_anything() {
    let Some(host) = Host::new() else { return };
    let disk = host.disk();
    fs::write(host.store().disk_dir(&disk).join("metadata.json"), "{").unwrap();
    let made = text(&host.ok("snapshot_disk", &json!([disk, {"job": "db"}])));
    host.ok("delete_snapshot", &json!([made]));
    host.ok("set_disk_metadata", &json!([disk, {"owner": "bosh"}]));
    assert_eq!(metadata(&host, &disk), json!({"owner": "bosh"}));
}
