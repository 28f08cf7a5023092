//! Findings about disks: their owners, unfinished copies, missing and unknown images.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use bosh_qemu_cpi::cid::{Cid, DiskCid};
use bosh_qemu_cpi::store::DiskRecord;
use bosh_qemu_cpi::store::record::{AttachmentPhase, DiskImage};
use serde_json::{Value, json};

use crate::support::crash_points::call_with_crash;
use crate::support::host::{GUEST, Host, MUTE_GUEST, eventually, text};
use crate::support::images::{assert_pattern, record, write_pattern};
use crate::support::skip;

/// Whether the command reported no open finding, and kind, subject and cure of each finding.
fn findings(host: &Host, command: &str) -> (bool, Vec<(String, String, Value)>) {
    let (passed, printed) = host.command(&[command, "--json"]);
    let finding = |f: &Value| (text(&f["kind"]), text(&f["what"]), f["cure"].clone());
    (passed, printed["findings"].as_array().unwrap().iter().map(finding).collect())
}

fn assert_repaired(host: &Host, kind: &str, what: &str) {
    let one = |cure: &str| vec![(kind.to_owned(), what.to_owned(), json!(cure))];
    assert_eq!(findings(host, "audit"), (false, one("gc")));
    assert_eq!(findings(host, "gc"), (true, one("repaired")));
    assert_eq!(findings(host, "audit"), (true, vec![]));
}

/// Kind and subject of the only finding, which needs a decision of the operator.
fn only_finding(host: &Host) -> (String, String) {
    let (clean, mut found) = findings(host, "gc");
    assert!(!clean && found.len() == 1 && found[0].2["operator"].is_string(), "{found:?}");
    let (kind, what, _) = found.remove(0);
    (kind, what)
}

fn change(host: &Host, disk: &DiskCid, change: impl FnOnce(&mut DiskRecord)) {
    let mut disk = record(host, disk);
    change(&mut disk);
    host.store().write(&disk).unwrap();
}

#[test]
fn gc_with_wrong_disk_owner_follows_the_vm_record() {
    let Some(host) = Host::new() else { return };
    let (vm, other, disk) = (host.booted_vm(), host.booted_vm(), host.disk());
    host.ok("attach_disk", &json!([vm, disk]));
    for wrong in [None, Some(other.clone())] {
        change(&host, &disk, |disk| disk.vm = wrong);
        assert_repaired(&host, "unsettled", &format!("{disk} on {vm}"));
        assert_eq!(record(&host, &disk).vm.as_ref(), Some(&vm));
        let refused = host.call("attach_disk", &json!([other, disk]));
        assert!(refused.failure().message.contains(vm.as_str()), "{refused:?}");
    }
}

#[test]
fn gc_with_disk_of_two_vms_reports_it() {
    let Some(host) = Host::new() else { return };
    let (vm, other, disk) = (host.booted_vm(), host.booted_vm(), host.disk());
    host.ok("attach_disk", &json!([vm, disk]));
    let mut wrong = host.record(&other);
    wrong.set_attachment(&disk, AttachmentPhase::Attached);
    host.store().write(&wrong).unwrap();
    assert_eq!(only_finding(&host), ("unsettled".to_owned(), format!("{disk} on {other}")));
    assert_eq!(record(&host, &disk).vm.as_ref(), Some(&vm), "the record is unchanged");
    wrong.remove_attachment(&disk);
    host.store().write(&wrong).unwrap();
}

#[test]
fn gc_after_interrupted_copy_leaves_one_image() {
    let Some(host) = Host::new() else { return };
    let disk = host.disk();
    write_pattern(&host, &disk);
    let copy = DiskImage { generation: 1, ..record(&host, &disk).current() };
    let path = host.store().disk_image_at(&disk, &copy).unwrap();
    fs::write(&path, "half").unwrap();
    change(&host, &disk, |disk| disk.inactive_image = Some(copy));
    // update_disk writes this note, too, so that the next create recovers the copy. It is no second
    // finding.
    fs::write(host.store().pending_dir().join(disk.as_str()), "").unwrap();
    assert_repaired(&host, "unfinished", disk.as_str());
    assert!(!path.exists());
    assert_eq!(record(&host, &disk).inactive_image, None);
    assert_pattern(&host, &disk);
}

#[test]
fn gc_during_detach_disk_keeps_its_prepared_records() {
    let Some(host) = Host::new() else { return };
    let (vm, disk) = (host.vm(&host.import(MUTE_GUEST)), host.disk());
    host.ok("attach_disk", &json!([vm, disk]));
    let mut detach = host.start("detach_disk", &json!([vm, disk]));
    // In this phase, detach_disk writes nothing else.
    let asked = || {
        host.record(&vm).attachment(&disk).is_some_and(|it| it.phase == AttachmentPhase::Detaching)
    };
    eventually("the guest is asked", || asked().then_some(()));
    let ready = |dir: &Path| {
        let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        let mut names =
            names.filter(|name| name.file_name().unwrap().to_string_lossy().starts_with(".new-"));
        names.next()
    };
    for dir in [host.paths(&vm).dir, host.store().disk_dir(&disk)] {
        let file = eventually("the record is ready", || ready(&dir));
        let hours_ago = SystemTime::now() - Duration::from_secs(7200);
        fs::File::options().write(true).open(&file).unwrap().set_modified(hours_ago).unwrap();
    }
    assert_eq!(findings(&host, "gc"), (true, vec![]));
    detach.kill().unwrap();
    detach.wait().unwrap();
    let (_, found) = findings(&host, "gc");
    let orphans = found.iter().filter(|(kind, _, cure)| kind == "orphan" && cure == "repaired");
    assert_eq!(orphans.count(), 2, "{found:?}");
}

#[test]
fn gc_after_killed_delete_disk_finishes_it() {
    if !cfg!(debug_assertions) {
        return skip("crash points are for builds with debug assertions");
    }
    let Some(host) = Host::new() else { return };
    let disk = host.disk();
    let killed = |point| {
        assert!(
            call_with_crash(&host, "delete_disk", &json!([disk]), [("AT", point)]).is_none(),
            "{point}"
        );
    };
    killed("lock of a metadata taken#1");
    assert_eq!(findings(&host, "audit"), (true, vec![]), "nothing is unfinished");
    killed("a disk's file removed#1");
    assert_repaired(&host, "unfinished", disk.as_str());
    host.assert_no_leaks();
}

#[test]
fn gc_with_missing_or_unknown_images_reports_them() {
    let Some(host) = Host::new() else { return };
    for pool in ["fast", "slow"] {
        fs::create_dir(host.path(pool)).unwrap();
    }
    host.reconfigure(|config| {
        config["pools"] =
            json!({"fast": {"path": host.path("fast")}, "slow": {"path": host.path("slow")}});
    });
    let disk: DiskCid =
        text(&host.ok("create_disk", &json!([8, {"pool": "fast"}, null]))).parse().unwrap();
    let vm = host.vm(&host.stemcell());
    assert_eq!(findings(&host, "audit"), (true, vec![]));

    let (image, aside) =
        (host.store().disk_image(&record(&host, &disk)).unwrap(), host.path("aside"));
    fs::rename(&image, &aside).unwrap();
    assert_eq!(only_finding(&host), ("no-image".to_owned(), disk.to_string()));
    fs::rename(&aside, &image).unwrap();
    let root = host.paths(&vm).dir.join("root.qcow2");
    fs::rename(&root, &aside).unwrap();
    assert_eq!(only_finding(&host), ("no-image".to_owned(), vm.to_string()));
    fs::rename(&aside, &root).unwrap();

    // One directory of this host's disk in a pool that its record does not name, and one of another
    // host's disk in a shared pool.
    let (ours, theirs) =
        (host.path("slow").join(disk.as_str()), host.path("slow").join(DiskCid::random().as_str()));
    for dir in [&ours, &theirs] {
        fs::create_dir(dir).unwrap();
        fs::write(dir.join("disk.qcow2"), "precious").unwrap();
    }
    assert_eq!(only_finding(&host), ("no-record".to_owned(), disk.to_string()));
    assert!(ours.join("disk.qcow2").exists() && theirs.join("disk.qcow2").exists());
    fs::remove_dir_all(ours).unwrap();
    assert_eq!(findings(&host, "gc"), (true, vec![]));
    assert!(theirs.join("disk.qcow2").exists());
}

/// The creates are killed after their last step, before they answer.
#[test]
fn gc_with_unacknowledged_objects_reports_them() {
    if !cfg!(debug_assertions) {
        return skip("crash points are for builds with debug assertions");
    }
    let Some(host) = Host::new() else { return };
    let disk = host.disk();
    let image = host.path("an-image");
    fs::write(&image, [GUEST, &[7; 4096]].concat()).unwrap();
    let unacknowledged = || {
        let (_, printed) = host.command(&["gc", "--json"]);
        let found = printed["findings"].as_array().unwrap().clone();
        assert!(found.iter().all(|finding| finding["kind"] == "unacknowledged"), "{found:?}");
        found.iter().map(|finding| finding["what"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(unacknowledged(), Vec::<String>::new());
    for (create, arguments, delete) in [
        ("create_disk", json!([8, {}, null]), "delete_disk"),
        ("snapshot_disk", json!([disk, {}]), "delete_snapshot"),
        ("create_stemcell", json!([image, {}]), "delete_stemcell"),
    ] {
        assert!(
            call_with_crash(&host, create, &arguments, [("AT", "done, not answered")]).is_none()
        );
        let found = unacknowledged();
        assert_eq!(found.len(), 1, "{create}: {found:?}");
        // `gc` keeps it, because its caller may have read the answer.
        assert_eq!(unacknowledged(), found, "{create}");
        host.ok(delete, &json!([found[0]]));
        assert_eq!(unacknowledged(), Vec::<String>::new(), "{create}");
    }
    // A call that names the disk acknowledges it.
    assert!(
        call_with_crash(
            &host,
            "create_disk",
            &json!([8, {}, null]),
            [("AT", "done, not answered")]
        )
        .is_none()
    );
    let known = unacknowledged().pop().unwrap();
    host.ok("set_disk_metadata", &json!([known, {}]));
    assert_eq!(unacknowledged(), Vec::<String>::new());
}
