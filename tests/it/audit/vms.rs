//! Findings about VMs, their records and files: what `audit` reports and `gc` repairs.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bosh_qemu_cpi::cid::Cid;
use bosh_qemu_cpi::store::record::{AttachmentPhase, StemcellRecord};
use bosh_qemu_cpi::store::{DiskRecord, Phase, SnapshotRecord, VmRecord};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::crash_points::{call_with_crash, for_each_crash_point};
use crate::support::host::{Host, eventually, text, vm_cid, wait_for_exit};
use crate::support::skip;

/// Whether the command reported no open finding, and kind, subject and cure of each finding.
fn findings(host: &Host, words: &[&str]) -> (bool, Vec<(String, String, Value)>) {
    let (passed, printed) = host.command(words);
    assert_eq!(printed["clean"], passed);
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let finding = |f: &Value| (text(&f["kind"]), text(&f["what"]), f["cure"].clone());
    (passed, printed["findings"].as_array().unwrap().iter().map(finding).collect())
}

fn audit(host: &Host) -> Vec<(String, String, Value)> {
    findings(host, &["audit", "--json"]).1
}

fn gc(host: &Host) -> Vec<(String, String, Value)> {
    findings(host, &["gc", "--json"]).1
}

fn single_finding(kind: &str, what: &impl ToString, cure: &str) -> Vec<(String, String, Value)> {
    vec![(kind.to_owned(), what.to_string(), json!(cure))]
}

/// Every path in the state and run directories, with the time of its last change and its size.
fn modification_times(host: &Host) -> BTreeMap<PathBuf, (i64, i64, u64)> {
    let mut dirs = vec![host.path("state"), host.store().run_dir().to_owned()];
    let mut seen = BTreeMap::new();
    while let Some(dir) = dirs.pop() {
        for path in fs::read_dir(&dir)
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().path())
            .chain([dir.clone()])
        {
            let Ok(meta) = path.symlink_metadata() else { continue };
            if meta.is_dir() && path != dir {
                dirs.push(path.clone());
            }
            seen.insert(path, (meta.ctime(), meta.ctime_nsec(), meta.size()));
        }
    }
    seen
}

#[test]
fn audit_and_list_write_nothing() {
    let Some(host) = Host::new() else { return };
    let look = |host: &Host| {
        let before = modification_times(host);
        for words in [
            ["audit", "--json"].as_slice(),
            &["gc", "--dry-run", "--json"],
            &["vm", "list", "--json"],
        ] {
            host.command(words);
        }
        let _ =
            host.namespace().run(|| host.cpi().args(["pool", "list", "--json"]).output().unwrap());
        assert_eq!(modification_times(host), before);
    };
    look(&host);
    let (vm, attached, free) = (host.booted_vm(), host.disk(), host.disk());
    host.ok("attach_disk", &json!([vm, attached]));
    host.power_off(&vm);
    let store = host.store();
    let record = store.read::<DiskRecord>(&free).unwrap().unwrap();
    store.write(&DiskRecord { phase: Phase::Deleting, ..record }).unwrap();
    // As in a copy of the state directory without its locks.
    for lock in fs::read_dir(host.path("state/locks")).unwrap() {
        fs::remove_file(lock.unwrap().path()).unwrap();
    }
    // The pid in the note belongs to no process.
    std::os::unix::fs::symlink("999999999", store.pending_dir().join("vm-aaaaaaaaaaaaaaa"))
        .unwrap();
    std::os::unix::fs::symlink("vm-bbbbbbbbbbbbbbb", host.path("state/uids/1900000007")).unwrap();
    assert_eq!(audit(&host).len(), 3);
    look(&host);
    assert!(findings(&host, &["gc", "--json"]).0);
}

#[test]
fn audit_of_sound_host_finds_nothing() {
    let Some(host) = Host::new() else { return };
    assert_eq!(findings(&host, &["audit", "--json"]), (true, vec![]), "on an empty host");
    let vm = host.booted_vm();
    let (disk, off) = (host.disk(), host.booted_vm());
    host.ok("attach_disk", &json!([vm, disk]));
    host.power_off(&off);
    assert_eq!(findings(&host, &["audit", "--json"]), (true, vec![]));
    assert_eq!(findings(&host, &["gc", "--json"]), (true, vec![]));
    assert_eq!(host.ok("has_vm", &json!([vm])), true);
}

#[test]
fn audit_after_host_stop_finds_nothing() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    assert!(host.command(&["host", "stop", "--json"]).0);
    assert!(host.qemu(&vm).is_none());
    assert_eq!(findings(&host, &["audit", "--json"]), (true, vec![]), "stopped on purpose");
    assert!(host.command(&["host", "start", "--json"]).0);
    assert_eq!(findings(&host, &["audit", "--json"]), (true, vec![]));
    // A crash is a finding, whatever happened before.
    let store = host.store();
    let record = store.read::<VmRecord>(&vm).unwrap().unwrap();
    assert!(host.command(&["host", "stop", "--json"]).0);
    store.write(&VmRecord { run: record.run + 1, ..record }).unwrap();
    let found = audit(&host);
    assert_eq!((found.len(), found[0].0.as_str(), &found[0].1), (1, "down", &vm.to_string()));
}

/// Kills `method` at each of its points. `gc` must leave only whole objects.
fn assert_gc_cleans_up_after_crashes(method: &str, prepare: impl Fn(&Host, &str) -> Value) {
    if !cfg!(debug_assertions) {
        return skip("crash points are for builds with debug assertions");
    }
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    for_each_crash_point(
        &host,
        method,
        || prepare(&host, &stemcell),
        |crash| {
            let is_acknowledged = |(kind, _, _): &(String, String, Value)| kind != "unacknowledged";
            let reported: Vec<_> = audit(&host).into_iter().filter(is_acknowledged).collect();
            assert!(
                reported.iter().all(|(_, _, cure)| *cure == "gc"),
                "{}: {reported:?}",
                crash.point
            );
            // A VM that an orphaned supervisor still launches is locked, so it is no finding yet.
            eventually("every VM is ready or removed", || {
                let repaired: Vec<_> = gc(&host).into_iter().filter(is_acknowledged).collect();
                assert!(
                    repaired.iter().all(|(_, _, cure)| *cure == "repaired"),
                    "{}: {repaired:?}",
                    crash.point
                );
                let store = host.store();
                let vms = store.list::<VmRecord>().unwrap();
                let whole = vms.iter().all(|vm| {
                    store.read(vm).unwrap().is_some_and(|vm: VmRecord| vm.phase == Phase::Ready)
                });
                whole.then_some(())
            });
            let left: Vec<_> = audit(&host).into_iter().filter(is_acknowledged).collect();
            assert_eq!(left, [], "{}", crash.point);
            let store = host.store();
            for vm in store.list::<VmRecord>().unwrap() {
                host.ok("delete_vm", &json!([vm]));
            }
            for disk in store.list::<DiskRecord>().unwrap() {
                host.ok("delete_disk", &json!([disk]));
            }
            let left: Vec<_> =
                host.leaks().into_iter().filter(|left| !left.contains(&stemcell)).collect();
            assert!(left.is_empty(), "{}: {left:?}", crash.point);
            format!("{} findings", reported.len())
        },
    );
}

#[test]
fn gc_after_killed_create_vm_cleans_up() {
    assert_gc_cleans_up_after_crashes("create_vm", Host::vm_arguments);
}

#[test]
fn gc_after_killed_delete_vm_cleans_up() {
    assert_gc_cleans_up_after_crashes("delete_vm", |host, stemcell| json!([host.vm(stemcell)]));
}

#[test]
fn gc_after_killed_create_or_delete_disk_cleans_up() {
    assert_gc_cleans_up_after_crashes("create_disk", |_, _| json!([8, {}, null]));
    assert_gc_cleans_up_after_crashes("delete_disk", |host, _| json!([host.disk()]));
}

#[test]
fn gc_after_interrupted_attach_disk_asks_qemu() {
    let Some(host) = Host::new() else { return };
    let (vm, disk) = (host.booted_vm(), host.disk());
    host.ok("attach_disk", &json!([vm, disk]));
    let interrupted = || {
        let mut record = host.record(&vm);
        record.set_attachment(&disk, AttachmentPhase::Attaching);
        host.store().write(&record).unwrap();
    };
    interrupted();
    let what = format!("{disk} on {vm}");
    assert_eq!(audit(&host), single_finding("unsettled", &what, "gc"));
    let (clean, found) = findings(&host, &["gc", "--json"]);
    assert!(
        !clean && found[0].2["operator"].as_str().unwrap().contains("repeat"),
        "the guest has the disk: {found:?}"
    );
    host.ok("detach_disk", &json!([vm, disk]));
    interrupted();
    assert_eq!(
        gc(&host),
        single_finding("unsettled", &what, "repaired"),
        "the guest does not have the disk"
    );
    assert_eq!(host.ok("get_disks", &json!([vm])), json!([]));
}

#[test]
fn gc_after_interrupted_delete_snapshot_finishes_it() {
    let Some(host) = Host::new() else { return };
    let disk = host.disk();
    let snapshot = text(&host.ok("snapshot_disk", &json!([disk, {}]))).parse().unwrap();
    let record = host.store().read::<SnapshotRecord>(&snapshot).unwrap().unwrap();
    host.store().write(&SnapshotRecord { phase: Phase::Deleting, ..record }).unwrap();
    assert_eq!(gc(&host), single_finding("unfinished", &snapshot, "repaired"));
    assert!(host.store().list::<SnapshotRecord>().unwrap().is_empty());
    assert_eq!(gc(&host), []);
}

#[test]
fn gc_with_unsupervised_vm_starts_a_supervisor() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let supervisor = host.supervisor(&vm).unwrap();
    supervisor.signal(Signal::SIGKILL).unwrap();
    wait_for_exit(&supervisor);
    assert_eq!(audit(&host), single_finding("unsupervised", &vm, "gc"));
    assert!(host.supervisor(&vm).is_none(), "audit changes nothing");
    assert_eq!(
        findings(&host, &["gc", "--json"]),
        (true, single_finding("unsupervised", &vm, "repaired"))
    );
    assert!(host.supervisor(&vm).is_some());
    assert_eq!(audit(&host), []);
}

/// create_vm is killed after its last step, before it answers. Then the power is cut.
#[test]
fn audit_of_unacknowledged_vm_reports_it_and_create_vm_replaces_it() {
    if !cfg!(debug_assertions) {
        return skip("crash points are for builds with debug assertions");
    }
    let Some(host) = Host::new() else { return };
    let arguments = host.vm_arguments(&host.stemcell());
    let made = call_with_crash(&host, "create_vm", &arguments, [("AT", "pending note removed")]);
    assert!(made.is_none());
    host.lose_power();
    host.command(&["host", "start", "--json"]);
    let unacknowledged = host.store().list::<VmRecord>().unwrap().pop().unwrap();
    let found = audit(&host);
    assert_eq!(
        (found[0].0.as_str(), found[0].1.as_str(), found.len()),
        ("unacknowledged", unacknowledged.as_str(), 1),
        "{found:?}"
    );
    // A Director that asks for the address again does not know the VM that has it.
    let vm = vm_cid(&host.ok("create_vm", &arguments));
    assert_eq!(host.store().list::<VmRecord>().unwrap(), std::slice::from_ref(&vm));
    assert_eq!(audit(&host), []);

    // A call that names the VM acknowledges it.
    host.ok("delete_vm", &json!([vm]));
    assert!(
        call_with_crash(&host, "create_vm", &arguments, [("AT", "pending note removed")]).is_none()
    );
    let named = host.store().list::<VmRecord>().unwrap().pop().unwrap();
    host.ok("set_vm_metadata", &json!([named, {}]));
    assert_eq!(audit(&host), []);
    let refused = host.call("create_vm", &arguments);
    assert!(
        refused.failure().message.contains(&format!("is reserved by VM '{named}'")),
        "{refused:?}"
    );
}

#[test]
fn audit_of_stopped_vm_that_should_run_reports_it() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    host.lose_power();
    let found = audit(&host);
    assert_eq!((found[0].0.as_str(), found[0].1.as_str(), found.len()), ("down", vm.as_str(), 1));
    assert!(found[0].2["operator"].as_str().unwrap().contains("host start"), "{found:?}");
    let (clean, found) = findings(&host, &["gc", "--json"]);
    assert!(!clean && found.len() == 1, "gc starts nothing: {found:?}");
    host.command(&["host", "start", "--json"]);
    assert_eq!(audit(&host), []);
}

#[test]
fn gc_with_unreadable_record_reports_and_keeps_it() {
    let Some(host) = Host::new() else { return };
    let (disk, other) = (host.disk(), host.disk());
    let record = host.store().disk_dir(&disk).join("disk.json");
    let text = fs::read(&record).unwrap();
    fs::write(&record, &text[..text.len() / 2]).unwrap();
    let found = gc(&host);
    assert_eq!(
        (found[0].0.as_str(), found[0].1.as_str(), found.len()),
        ("corrupt", disk.as_str(), 1),
        "{found:?}"
    );
    fs::rename(&record, host.path("aside")).unwrap();
    let found = gc(&host);
    assert_eq!(
        (found[0].0.as_str(), found[0].1.as_str(), found.len()),
        ("no-record", disk.as_str(), 1),
        "{found:?}"
    );
    fs::rename(host.path("aside"), &record).unwrap();
    fs::write(&record, text).unwrap();
    assert_eq!(gc(&host), []);
    assert_eq!(
        [disk, other].map(|disk| host.ok("has_disk", &json!([disk]))),
        [json!(true), json!(true)]
    );
}

/// As in a copy of the state directory without links, and in one whose links were changed.
#[test]
fn gc_with_missing_reservations_restores_them() {
    let Some(host) = Host::new() else { return };
    let (stemcell, state) = (host.stemcell(), host.path("state"));
    let mut arguments = host.vm_arguments(&stemcell);
    arguments[2]["ports"] = json!([{"host": "8080-8081", "guest": "80-81"}]);
    let vm = vm_cid(&host.ok("create_vm", &arguments));
    let names = || {
        let links = ["uids", "claims"].map(|dir| fs::read_dir(state.join(dir)).unwrap());
        let links = links.into_iter().flatten().map(|link| link.unwrap().path());
        links.map(|path| (path.clone(), fs::read_link(path).unwrap())).collect::<BTreeMap<_, _>>()
    };
    let before = names();
    assert_eq!(before.len(), 4, "a uid, an address, two ports: {before:?}");
    let spoil: [fn(&Path); 3] = [
        |_| {},
        |path| fs::write(path, "").unwrap(),
        // A VM that does not exist.
        |path| std::os::unix::fs::symlink("vm-aaaaaaaaaaaaaaa", path).unwrap(),
    ];
    for spoil in spoil {
        for path in before.keys() {
            fs::remove_file(path).unwrap();
            spoil(path);
        }
        let found = audit(&host);
        assert!(
            found.iter().all(|(kind, _, cure)| kind == "unreserved" && *cure == "gc"),
            "{found:?}"
        );
        assert_eq!(found.len(), 4, "{found:?}");
        let (clean, found) = findings(&host, &["gc", "--json"]);
        assert!(clean, "{found:?}");
        assert_eq!(names(), before);
        assert_eq!(audit(&host), []);
    }
    let refused = host.call("create_vm", &arguments);
    assert!(
        refused.failure().message.contains(&format!("is reserved by VM '{vm}'")),
        "{refused:?}"
    );
}

#[test]
fn gc_with_two_vms_of_one_uid_reports_them() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let (one, other) = (host.vm(&stemcell), host.vm(&stemcell));
    let link = host.path("state/uids").join(host.record(&one).uid.to_string());
    fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(other.as_str(), &link).unwrap();
    let (clean, found) = findings(&host, &["gc", "--json"]);
    assert!(
        !clean
            && found.len() == 1
            && found[0].0 == "unreserved"
            && found[0].2["operator"].is_string(),
        "{found:?}"
    );
    fs::remove_file(&link).unwrap();
    assert!(findings(&host, &["gc", "--json"]).0);
}

#[test]
fn gc_with_stray_files_removes_them() {
    let Some(host) = Host::new() else { return };
    host.ok("delete_stemcell", &json!([host.stemcell()]));
    let state = host.path("state");
    let gone = "vm-aaaaaaaaaaaaaaa";
    fs::write(state.join("locks").join(format!("vm.{gone}")), "").unwrap();
    // The pid in the lock belongs to no process.
    fs::write(state.join("locks/network.br7"), "999999999\n").unwrap();
    std::os::unix::fs::symlink(gone, state.join("uids/1900000007")).unwrap();
    fs::create_dir_all(state.join("vms/vm-bbbbbbbbbbbbbbb")).unwrap();
    let (old, new) = (state.join(".new-old"), state.join(".new-new"));
    let hour_ago = SystemTime::now() - Duration::from_secs(3600);
    fs::File::create(&old).unwrap().set_modified(hour_ago).unwrap();
    fs::write(&new, "").unwrap();
    let before = audit(&host);
    assert!(before.iter().all(|(_, _, cure)| *cure == "gc"), "{before:?}");
    let (clean, found) = findings(&host, &["gc", "--json"]);
    assert!(clean, "{found:?}");
    assert!(new.exists() && !old.exists(), "a new temporary file stays");
    fs::remove_file(new).unwrap();
    host.assert_no_leaks();
    assert_eq!(host.store().list::<StemcellRecord>().unwrap().len(), 0);
}

#[test]
fn gc_with_orphaned_qemu_ends_it() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let (paths, aside) = (host.paths(&vm), host.path("aside"));
    let qemu = host.qemu(&vm).unwrap();
    // As if an operator had removed the directory.
    fs::rename(&paths.dir, &aside).unwrap();
    let found = audit(&host);
    assert_eq!(found, single_finding("orphan", &vm, "gc"));
    assert!(host.qemu(&vm).is_some(), "audit changes nothing");
    assert_eq!(
        findings(&host, &["gc", "--json"]),
        (true, single_finding("orphan", &vm, "repaired"))
    );
    wait_for_exit(&qemu);
    assert!(!paths.run.exists());
    fs::rename(&aside, &paths.dir).unwrap();
}

#[test]
fn call_with_run_dir_of_another_state_directory_is_refused() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    host.reconfigure(|config| config["state_dir"] = json!(host.path("other")));
    let answer = host.call("create_disk", &json!([8, {}, null]));
    let failure = answer.failure();
    assert!(
        failure.message.contains("run_dir") && failure.message.contains("other"),
        "{failure:?}"
    );
    let output = host.namespace().run(|| host.cpi().args(["gc", "--json"]).output().unwrap());
    assert!(!output.status.success() || !host.path("other").exists());
    host.reconfigure(|config| config["state_dir"] = json!(host.path("state")));
    assert!(host.qemu(&vm).is_some());
    let _ = fs::remove_dir_all(host.path("other"));
}
