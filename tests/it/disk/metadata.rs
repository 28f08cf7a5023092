//! set_disk_metadata does not wait for other calls on the disk, and they do not lose what it wrote.

use std::fs;
use std::process::Child;
use std::time::Instant;

use bosh_qemu_cpi::store::{DiskRecord, Phase, Rank, SnapshotRecord};
use serde_json::{Value, json};

use crate::support::answer::Answer;
use crate::support::disks::metadata;
use crate::support::host::{Host, eventually, text};
use crate::support::images::{assert_pattern, record, write_pattern};

/// A host with short deadlines.
fn host_with_short_deadlines() -> Option<Host> {
    Host::with(json!({"deadlines": {"set_disk_metadata": 3, "delete_disk": 3}}))
}

#[test]
fn set_disk_metadata_of_locked_disk_does_not_wait() {
    let Some(host) = host_with_short_deadlines() else { return };
    let disk = host.disk();
    let work = host.store().lock(Rank::Disk, &disk, Instant::now()).unwrap();
    host.ok("set_disk_metadata", &json!([disk, {"owner": "bosh"}]));
    drop(work);
    assert_eq!(metadata(&host, &disk), json!({"owner": "bosh"}));
}

/// Waits until `call` waits for `lock`.
fn wait_for_lock(call: &Child, lock: &str) {
    eventually("the call waits for the lock", || {
        let files = fs::read_dir(format!("/proc/{}/fd", call.id())).ok()?.flatten();
        let mut names = files.filter_map(|file| fs::read_link(file.path()).ok());
        names.find(|name| name.ends_with(lock))
    });
}

#[test]
fn set_disk_metadata_during_copy_keeps_both() {
    let Some(host) = host_with_short_deadlines() else { return };
    let (vm, disk) = (host.booted_vm(), host.disk());
    host.ok("attach_disk", &json!([vm, disk]));
    for (method, arguments) in [
        ("snapshot_disk", json!([disk, {}])),
        ("resize_disk", json!([disk, 16])),
        ("update_disk", json!([disk, 16, {"format": "raw"}])),
    ] {
        host.ok("set_disk_metadata", &json!([disk, {"before": method}]));
        // The call has read the disk's record and holds the disk's lock when it waits for this one.
        let space = host.store().lock(Rank::Space, "all", Instant::now()).unwrap();
        let call = host.start(method, &arguments);
        wait_for_lock(&call, "locks/space.all");
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
fn resize_disk_of_first_version_keeps_its_metadata() {
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
fn set_disk_metadata_during_delete_disk_is_not_found() {
    let Some(host) = host_with_short_deadlines() else { return };
    let disk = host.disk();
    write_pattern(&host, &disk);
    let writes = host.store().lock(Rank::Metadata, &disk, Instant::now()).unwrap();
    let waits = host.call("delete_disk", &json!([disk]));
    assert!(waits.failure().message.contains(&format!("metadata.{disk}")), "{waits:?}");
    assert_pattern(&host, &disk);
    assert_eq!(record(&host, &disk).phase, Phase::Ready, "delete_disk has changed nothing");

    host.reconfigure(|config| config["deadlines"] = json!({}));
    let call = host.start("set_disk_metadata", &json!([disk, {"owner": "late"}]));
    wait_for_lock(&call, &format!("locks/metadata.{disk}"));
    // What delete_disk does while it holds the lock.
    host.store().remove::<DiskRecord>(&disk).unwrap();
    writes.unlink().unwrap();
    let late = Answer::of(&call.wait_with_output().unwrap());
    assert_eq!(late.failure().kind, "DiskNotFound");
    host.ok("delete_disk", &json!([disk]));
    host.assert_no_leaks();
}

#[test]
fn snapshot_disk_with_unreadable_metadata_succeeds() {
    let Some(host) = Host::new() else { return };
    let disk = host.disk();
    fs::write(host.store().disk_dir(&disk).join("metadata.json"), "{").unwrap();
    let made = text(&host.ok("snapshot_disk", &json!([disk, {"job": "db"}])));
    host.ok("delete_snapshot", &json!([made]));
    host.ok("set_disk_metadata", &json!([disk, {"owner": "bosh"}]));
    assert_eq!(metadata(&host, &disk), json!({"owner": "bosh"}));
}

/// Older versions accepted metadata of any length.
#[test]
fn call_on_disk_with_long_metadata_of_older_version_succeeds() {
    let Some(host) = Host::new() else { return };
    let disk = host.disk();
    let file = host.path("state/disks").join(&disk).join("metadata.json");
    let tags: serde_json::Map<_, _> =
        (0..2000).map(|n| (format!("t{n}\u{1b}"), json!("x".repeat(100)))).collect();
    std::fs::write(&file, json!(tags).to_string()).unwrap();
    let snapshot = host.ok("snapshot_disk", &json!([disk, {}]));
    host.ok("delete_snapshot", &json!([snapshot]));
    assert_eq!(host.ok("has_disk", &json!([disk])), true);
    host.ok("set_disk_metadata", &json!([disk, {"a": "b"}]));
    host.ok("delete_disk", &json!([disk]));
}
