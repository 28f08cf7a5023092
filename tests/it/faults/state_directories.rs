//! State directories with wrong clocks, two on one host, moved, copied or not mounted.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use bosh_qemu_cpi::cid::VmCid;
use bosh_qemu_cpi::store::{DiskRecord, VmRecord};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

use crate::faults::damaged_records::Fixture;
use crate::support::answer::{self, Answer};
use crate::support::disks::is_plugged;
use crate::support::filesystem::Filesystem;
use crate::support::host::{Host, request};
use crate::support::images::{assert_pattern, write_pattern};

/// Sets the modification time of everything in `dir`.
fn set_times(dir: &Path, time: SystemTime) {
    for path in fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| !path.is_symlink())
    {
        fs::File::open(&path).unwrap().set_modified(time).unwrap();
        if path.is_dir() {
            set_times(&path, time);
        }
    }
}

#[test]
fn call_after_clock_jump_succeeds() {
    let Some(fixture) = Fixture::new() else { return };
    let (host, vm, disk) = (&fixture.host, &fixture.vm, fixture.host.disk());
    write_pattern(host, &disk);
    host.ok("attach_disk", &json!([vm, disk]));
    for (created_at, time) in [
        ("1970-01-01T00:00:00Z", SystemTime::UNIX_EPOCH),
        ("2999-12-31T23:59:59Z", SystemTime::now() + Duration::from_secs(1 << 30)),
        ("no time at all", SystemTime::now()),
    ] {
        let store = host.store();
        store.write(&VmRecord { created_at: created_at.into(), ..host.record(vm) }).unwrap();
        let record = store.read::<DiskRecord>(&disk).unwrap().unwrap();
        store.write(&DiskRecord { created_at: created_at.into(), ..record }).unwrap();
        set_times(&host.path("state"), time);
        let (clean, found) = host.command(&["gc", "--json"]);
        assert!(clean, "{created_at}: {found}");
        host.lose_power();
        set_times(&host.path("state"), time);
        let (well, started) = host.command(&["host", "start", "--json"]);
        assert!(well, "{created_at}: {started}");
        assert!(is_plugged(host, vm, &disk));
        assert_eq!(host.record(vm).created_at, created_at);
        fixture.assert_others_work();
    }
    host.ok("detach_disk", &json!([vm, disk]));
    assert_pattern(host, &disk);
}

/// Configures the state directory and the run directory of `host`.
fn use_directories(host: &Host, state: &Path, run: &Path) {
    host.reconfigure(|config| {
        config["state_dir"] = json!(state);
        config["run_dir"] = json!(run);
    });
}

#[test]
fn gc_with_two_state_directories_touches_only_its_own() {
    let Some(fixture) = Fixture::new() else { return };
    let host = &fixture.host;
    let own = (host.path("state"), host.store().run_dir().to_owned());
    let run = tempfile::Builder::new().prefix("bqt-").tempdir_in("/run").unwrap();
    let other = (host.path("other"), run.path().join("run"));
    use_directories(host, &other.0, &other.1);
    let stemcell = host.stemcell();
    let vm = host.vm(&stemcell);
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    let qemu = |vm: &VmCid| host.qemu(vm).expect("it runs").pid();
    let theirs = qemu(&vm);

    // `gc` of each keeps the VM of the other, on the same bridge and in the same tables.
    assert!(host.command(&["gc", "--json"]).0);
    use_directories(host, &own.0, &own.1);
    let (clean, found) = host.command(&["gc", "--json"]);
    assert!(clean, "{found}");
    let ours = qemu(&fixture.vm);
    fixture.assert_others_work();
    host.ok("delete_vm", &json!([fixture.vm]));
    assert!(
        host.namespace().link("bosh-nat0").is_some(),
        "a VM of the other state directory uses it"
    );
    assert_ne!(ours, theirs);

    use_directories(host, &other.0, &other.1);
    assert_eq!(qemu(&vm), theirs);
    host.ok("reboot_vm", &json!([vm]));
    host.delete_everything();
    assert!(host.namespace().link("bosh-nat0").is_none(), "the bridge goes with the last VM");
    use_directories(host, &own.0, &own.1);
    fs::remove_dir_all(other.0).unwrap();
}

/// The directory is moved while a VM runs, and a link replaces it.
#[test]
fn call_on_moved_and_linked_state_directory_succeeds() {
    let Some(fixture) = Fixture::new() else { return };
    let host = &fixture.host;
    let qemu = host.qemu(&fixture.vm).unwrap().pid();
    fs::rename(host.path("state"), host.path("moved")).unwrap();
    symlink(host.path("moved"), host.path("state")).unwrap();
    let (clean, found) = host.command(&["audit", "--json"]);
    assert!(clean, "{found}");
    fixture.assert_others_work();
    assert_eq!(host.qemu(&fixture.vm).unwrap().pid(), qemu);
    host.kill_qemu(&fixture.vm);
    host.wait_for_console(&fixture.vm, "BOOTSECTOR-OK", 2);
    // Configured by its new path, it is the same state directory.
    use_directories(host, &host.path("moved"), host.store().run_dir());
    fixture.assert_others_work();
    host.delete_everything();
    fs::remove_file(host.path("state")).unwrap();
    fs::rename(host.path("moved"), host.path("state")).unwrap();
    use_directories(host, &host.path("state"), host.store().run_dir());
}

#[test]
fn host_start_on_copied_state_directory_starts_its_vms() {
    let Some(fixture) = Fixture::new() else { return };
    let (host, vm) = (&fixture.host, &fixture.vm);
    let disk = host.disk();
    write_pattern(host, &disk);
    host.ok("attach_disk", &json!([vm, disk]));
    let before = host.record(vm);
    host.lose_power();
    let own = (host.path("state"), host.store().run_dir().to_owned());
    let run = tempfile::Builder::new().prefix("bqt-").tempdir_in("/run").unwrap();
    let copy = (host.path("elsewhere/copy"), run.path().join("run"));
    fs::create_dir(host.path("elsewhere")).unwrap();
    assert!(Command::new("cp").arg("-a").args([&own.0, &copy.0]).status().unwrap().success());

    // A copy may lack directories that are empty or useless elsewhere.
    for dir in ["locks", "pending", "snaps"] {
        fs::remove_dir_all(copy.0.join(dir)).unwrap();
    }
    use_directories(host, &copy.0, &copy.1);
    let (well, started) = host.command(&["host", "start", "--json"]);
    assert!(well, "{started}");
    host.wait_for_console(vm, "BOOTSECTOR-OK", 2);
    assert!(is_plugged(host, vm, &disk));
    let after = host.record(vm);
    assert_eq!((after.nics, after.uid, after.machine), (before.nics, before.uid, before.machine));
    let (clean, found) = host.command(&["audit", "--json"]);
    assert!(clean, "{found}");
    let other = host.vm(&fixture.stemcell);
    host.ok("detach_disk", &json!([vm, disk]));
    host.ok("attach_disk", &json!([other, disk]));
    host.ok("detach_disk", &json!([other, disk]));
    assert_pattern(host, &disk);
    host.delete_everything();
    use_directories(host, &own.0, &own.1);
    fs::remove_dir_all(host.path("elsewhere")).unwrap();
    // The original is unchanged.
    assert_pattern(host, &disk);
}

/// The state directory is on a filesystem of its own, which is in fstab but not mounted.
#[test]
fn call_on_unmounted_state_directory_is_refused() {
    let Some(table) = Filesystem::new(1) else { return };
    let Some(host) = Host::new() else { return };
    let (stemcell, disk) = (host.stemcell(), host.disk());
    let (state, away) = (host.path("state"), host.path("away"));
    let fstab = table.path().join("fstab");
    fs::write(&fstab, format!("/dev/vdz {} ext4 defaults 0 2\n", state.display())).unwrap();
    let nothing: Option<&str> = None;
    mount(Some(&fstab), "/etc/fstab", nothing, MsFlags::MS_BIND, nothing).unwrap();
    // The directory has content, so fstab does not matter.
    assert_eq!(host.ok("has_disk", &json!([disk])), true);
    fs::rename(&state, &away).unwrap();
    fs::create_dir(&state).unwrap();
    let (vm, snapshot, network) =
        ("vm-aaaaaaaaaaaaaaa", "snap-aaaaaaaaaaaaaaa", "net-aaaaaaaaaaaaaaa");
    for (method, arguments) in [
        ("has_disk", json!([disk])),
        ("has_vm", json!([vm])),
        ("delete_disk", json!([disk])),
        ("delete_vm", json!([vm])),
        ("delete_stemcell", json!([stemcell])),
        ("delete_snapshot", json!([snapshot])),
        ("delete_network", json!([network])),
        ("create_disk", json!([8, {}, null])),
        ("create_vm", host.vm_arguments(&stemcell)),
        ("attach_disk", json!([vm, disk])),
    ] {
        let refused = host.call(method, &arguments);
        let message = &refused.failure().message;
        assert!(
            message.contains(&format!("'{}' is not mounted", state.display())),
            "{method}: {message}"
        );
    }
    for words in [&["vm", "list"][..], &["host", "start"], &["gc"], &["audit"]] {
        let output = host.namespace().run(|| host.cpi().args(words).output().unwrap());
        let printed = format!("{output:?}");
        assert!(
            !output.status.success() && printed.contains("is not mounted"),
            "{words:?}: {printed}"
        );
    }
    assert_eq!(fs::read_dir(&state).unwrap().count(), 0);
    fs::remove_dir(&state).unwrap();
    fs::rename(&away, &state).unwrap();
    host.ok("delete_disk", &json!([disk]));
    umount2("/etc/fstab", MntFlags::MNT_DETACH).unwrap();
}

#[test]
fn change_state_directory_of_newer_version_is_refused() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let (vm, disk) = (host.vm(&stemcell), host.disk());
    let schema = host.path("state/schema");
    let known = fs::read(&schema).unwrap();
    fs::write(&schema, "99\n").unwrap();
    for (method, arguments) in [
        ("delete_vm", json!([vm])),
        ("reboot_vm", json!([vm])),
        ("set_vm_metadata", json!([vm, {"job": "db"}])),
        ("delete_stemcell", json!([stemcell])),
        ("attach_disk", json!([vm, disk])),
        ("detach_disk", json!([vm, disk])),
        ("resize_disk", json!([disk, 64])),
        ("update_disk", json!([disk, 64, {}])),
        ("set_disk_metadata", json!([disk, {"deployment": "d"}])),
        ("snapshot_disk", json!([disk, {}])),
        ("delete_disk", json!([disk])),
        ("create_disk", json!([1, {}, vm])),
    ] {
        let refused = host.call(method, &arguments);
        assert!(refused.failure().message.contains("newer bosh-qemu-cpi"), "{method}: {refused:?}");
    }
    fs::write(&schema, known).unwrap();
    assert_eq!(host.ok("has_vm", &json!([vm])), true);
    host.ok("attach_disk", &json!([vm, disk]));
    host.delete_everything();
}

#[test]
fn delete_as_another_user_is_refused() {
    let Some(host) = Host::new() else { return };
    let vm = host.vm(&host.stemcell());
    // A mount point is often readable for every user; the directories below are root's.
    for dir in ["", "state"] {
        fs::set_permissions(host.path(dir), fs::Permissions::from_mode(0o755)).unwrap();
    }
    for (method, arguments) in
        [("delete_vm", json!([vm])), ("delete_stemcell", json!([host.stemcell()]))]
    {
        let mut command = host.cpi();
        command.uid(65534);
        let output = answer::run(command, request(method, &arguments).to_string().as_bytes());
        let answer = Answer::of(&output);
        assert!(answer.failure().message.contains("Permission denied"), "{method}: {answer:?}");
    }
    assert_eq!(host.ok("has_vm", &json!([vm])), true);
    host.delete_everything();
}
