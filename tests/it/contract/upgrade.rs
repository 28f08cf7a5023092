//! Upgrade and downgrade: records, running VMs and supervisors of an older program, and records of
//! a newer one.
//!
//! `tests/fixtures/records/first` was written by the first version that ran VMs: a VM with one of
//! two disks.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use bosh_qemu_cpi::cid::{Cid, DiskCid, StemcellCid, VmCid};
use bosh_qemu_cpi::host::uids;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::answer::{Answer, run};
use crate::support::disks::metadata;
use crate::support::disks::{disk_in_qemu, is_plugged};
use crate::support::host::{GUEST, Host, request, vm_cid, wait_for_exit};
use crate::support::images::record;

/// A host after its reboot, with a state directory of the first version. Only the cids differ, so
/// that concurrent tests do not collide.
struct FirstVersion {
    host: Host,
    stemcell: StemcellCid,
    vm: VmCid,
    attached: DiskCid,
    free: DiskCid,
}

impl FirstVersion {
    fn new() -> Option<Self> {
        let host = Host::new()?;
        let (stemcell, vm) = (StemcellCid::random(), VmCid::random());
        let old = Self { host, stemcell, vm, attached: DiskCid::random(), free: DiskCid::random() };
        let state = old.host.path("state");
        for dir in ["stemcells", "vms", "disks", "locks", "pending", "uids"] {
            fs::create_dir_all(state.join(dir)).unwrap();
        }
        fs::write(state.join("schema"), "1\n").unwrap();
        let uid = uids::reserve(&state, &old.vm).unwrap();
        for (fixture, path) in
            ["stemcell", "vm", "attached-disk", "free-disk"].into_iter().zip(old.records())
        {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/records/first");
            let text = fs::read_to_string(dir.join(fixture).with_extension("json")).unwrap();
            let text = text
                .replace("stemcell-agvwqigefmijrbd", old.stemcell.as_str())
                .replace("vm-6r3yviydfwdups7", old.vm.as_str())
                .replace("disk-7775w4y5sqjgxux", old.attached.as_str())
                .replace("disk-apgaegmis4pgth7", old.free.as_str())
                .replace("1900045011", &uid.to_string());
            fs::create_dir(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        old.make_images(&state);
        Some(old)
    }

    /// Paths of the records: the stemcell's, the VM's, the disks'.
    fn records(&self) -> [PathBuf; 4] {
        let state = self.host.path("state");
        [
            state.join("stemcells").join(&self.stemcell).join("stemcell.json"),
            state.join("vms").join(&self.vm).join("vm.json"),
            state.join("disks").join(&self.attached).join("disk.json"),
            state.join("disks").join(&self.free).join("disk.json"),
        ]
    }

    fn make_images(&self, state: &Path) {
        let image = state.join("stemcells").join(&self.stemcell).join("image.raw");
        fs::write(&image, GUEST).unwrap();
        fs::File::options().write(true).open(&image).unwrap().set_len(1 << 20).unwrap();
        let vm = state.join("vms").join(&self.vm);
        fs::hard_link(&image, vm.join("base.raw")).unwrap();
        fs::write(vm.join("config.img"), vec![0; 1 << 20]).unwrap();
        let create = |image: PathBuf, words: &[&str]| {
            let mut create = Command::new("qemu-img");
            create.args(["create", "-q", "-f", "qcow2"]).arg(image).args(words);
            assert!(create.status().unwrap().success());
        };
        create(vm.join("root.qcow2"), &["-b", "base.raw", "-F", "raw"]);
        create(vm.join("ephemeral.qcow2"), &["16M"]);
        for disk in [&self.attached, &self.free] {
            create(state.join("disks").join(disk).join("disk.qcow2"), &["8M"]);
        }
    }
}

/// Changes the record at `path`.
fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut record: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut record);
    fs::write(path, record.to_string()).unwrap();
}

#[test]
fn call_on_state_of_first_version_succeeds() {
    let Some(old) = FirstVersion::new() else { return };
    let FirstVersion { host, stemcell, vm, attached, free } = &old;
    let before = host.record(vm);
    let (well, started) = host.command(&["host", "start", "--json"]);
    assert!(well, "{started}");
    host.wait_for_console(vm, "BOOTSECTOR-OK", 1);
    assert!(is_plugged(host, vm, attached));

    host.ok("set_vm_metadata", &json!([vm, {"name": "db/1"}]));
    host.ok("attach_disk", &json!([vm, free]));
    host.ok("detach_disk", &json!([vm, attached]));
    host.ok("resize_disk", &json!([attached, 9]));
    assert_eq!(metadata(host, attached), json!({"owner": "db/0"}));
    host.ok("set_disk_metadata", &json!([attached, {"owner": "db/1"}]));
    assert_eq!(metadata(host, attached), json!({"owner": "db/1"}));
    let snapshot = host.ok("snapshot_disk", &json!([attached, {}]));
    host.ok("update_disk", &json!([attached, 9, {"format": "raw"}]));
    assert_eq!(record(host, attached).image(), "disk-1.raw");
    assert_eq!(record(host, free).limits.iops, Some(500));
    host.ok("delete_snapshot", &json!([snapshot]));
    host.ok("reboot_vm", &json!([vm]));
    host.wait_for_console(vm, "BOOTSECTOR-OK", 2);
    let after = host.record(vm);
    assert_eq!((after.nics, after.machine, after.uid), (before.nics, before.machine, before.uid));
    let other = host.vm(stemcell.as_str());
    host.wait_for_console(&other, "BOOTSECTOR-OK", 1);
    let (clean, found) = host.command(&["audit", "--json"]);
    assert!(clean, "{found}");
}

#[test]
fn rewrite_record_with_unknown_fields_keeps_them() {
    let Some(old) = FirstVersion::new() else { return };
    let FirstVersion { host, vm, attached, free, .. } = &old;
    for path in old.records() {
        edit(&path, |record| record["from_the_future"] = json!({"x": [1, "two"]}));
    }
    host.ok("set_vm_metadata", &json!([vm, {}]));
    host.ok("set_disk_metadata", &json!([free, {}]));
    host.ok("attach_disk", &json!([vm, free]));
    host.ok("detach_disk", &json!([vm, attached]));
    assert!(host.command(&["host", "start", "--json"]).0);
    for path in old.records() {
        let record: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(record["from_the_future"], json!({"x": [1, "two"]}), "{}", path.display());
    }
}

#[test]
fn call_on_record_of_newer_schema_is_refused_and_changes_nothing() {
    let Some(old) = FirstVersion::new() else { return };
    let FirstVersion { host, stemcell, vm, free, .. } = &old;
    let [stemcell_record, vm_record, _, free_record] = old.records();
    let calls = [
        (
            stemcell_record,
            vec![
                ("create_vm", host.vm_arguments(stemcell.as_str())),
                ("delete_stemcell", json!([stemcell])),
            ],
        ),
        (
            vm_record,
            vec![
                ("set_vm_metadata", json!([vm, {}])),
                ("attach_disk", json!([vm, free])),
                ("reboot_vm", json!([vm])),
                ("has_vm", json!([vm])),
                ("delete_vm", json!([vm])),
            ],
        ),
        (
            free_record,
            vec![
                ("attach_disk", json!([vm, free])),
                ("resize_disk", json!([free, 9])),
                ("has_disk", json!([free])),
                ("delete_disk", json!([free])),
            ],
        ),
    ];
    for (path, calls) in calls {
        let understood = fs::read(&path).unwrap();
        edit(&path, |record| {
            record["schema"] = json!(2);
            record["phase"] = json!("hibernating");
        });
        let look =
            || (fs::read(&path).unwrap(), path.parent().unwrap().read_dir().unwrap().count());
        let written = look();
        for (method, arguments) in calls {
            let answer = host.call(method, &arguments);
            let failure = answer.failure();
            assert!(failure.message.contains("schema 2 is newer than 1"), "{method}: {failure:?}");
            assert!(!failure.ok_to_retry, "{method}");
        }
        host.command(&["gc", "--json"]);
        assert_eq!(look(), written, "{}", path.display());
        // Calls about other objects work.
        host.ok("delete_disk", &json!([host.disk()]));
        fs::write(&path, understood).unwrap();
    }
}

#[test]
fn call_in_state_directory_of_newer_schema_is_refused() {
    let Some(old) = FirstVersion::new() else { return };
    let host = &old.host;
    let schema = host.path("state/schema");
    for (text, hint) in
        [("2\n", "a newer bosh-qemu-cpi"), ("", "write 1 into it"), ("one", "write 1 into it")]
    {
        fs::write(&schema, text).unwrap();
        for (method, arguments) in
            [("create_disk", json!([8, {}, null])), ("create_stemcell", json!(["/x", {}]))]
        {
            let answer = host.call(method, &arguments);
            let failure = answer.failure();
            assert!(
                failure.message.contains("schema") && failure.message.contains(hint),
                "{failure:?}"
            );
        }
        assert_eq!(fs::read_to_string(&schema).unwrap(), text);
    }
    fs::write(&schema, "1\n").unwrap();
}

/// Result of a call that `binary` executes.
fn ask(host: &Host, binary: &Path, method: &str, arguments: &Value) -> Value {
    let mut command = Command::new(binary);
    command.arg("--config").arg(host.path("cpi.json"));
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let output = host.namespace().run(|| run(command, request(method, arguments).as_bytes()));
    host.track_vms(&String::from_utf8_lossy(&output.stdout));
    Answer::of(&output).result().clone()
}

/// Creates a VM with a copy of the program, replaces or removes the copy, and checks the old
/// supervisor.
fn assert_old_supervisor_works_after(replace: impl FnOnce(&Path)) {
    let Some(host) = Host::new() else { return };
    let (stemcell, disk) = (host.stemcell(), host.disk());
    let binary = host.path("opt/bosh-qemu-cpi");
    fs::create_dir_all(binary.parent().unwrap()).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_bosh-qemu-cpi"), &binary).unwrap();
    let vm = vm_cid(&ask(&host, &binary, "create_vm", &host.vm_arguments(&stemcell)));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    let (qemu, old) = (host.qemu(&vm).unwrap(), host.supervisor(&vm).unwrap());
    replace(&binary);
    let runs = |pid: i32| fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    assert!(runs(old.pid()).to_string_lossy().ends_with(" (deleted)"));

    // Calls of the new program.
    host.ok("attach_disk", &json!([vm, disk]));
    assert_eq!(disk_in_qemu(&host, &vm, &disk), (true, 2, 1));
    host.ok("set_vm_metadata", &json!([vm, {"name": "db/0"}]));
    assert_eq!(
        (host.qemu(&vm).unwrap().pid(), host.supervisor(&vm).unwrap().pid()),
        (qemu.pid(), old.pid())
    );

    // The old supervisor restarts QEMU after a crash.
    host.kill_qemu(&vm);
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
    assert_eq!(host.supervisor(&vm).unwrap().pid(), old.pid());
    assert!(is_plugged(&host, &vm, &disk));

    // A new supervisor takes over, and QEMU keeps running.
    let qemu = host.qemu(&vm).unwrap();
    old.signal(Signal::SIGKILL).unwrap();
    wait_for_exit(&old);
    host.ok("detach_disk", &json!([vm, disk]));
    let new = host.supervisor(&vm).expect("a new one");
    assert_eq!(
        runs(new.pid()),
        Path::new(env!("CARGO_BIN_EXE_bosh-qemu-cpi")).canonicalize().unwrap()
    );
    assert_eq!(host.qemu(&vm).unwrap().pid(), qemu.pid());
    host.kill_qemu(&vm);
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 3);
    assert_eq!(host.supervisor(&vm).unwrap().pid(), new.pid());
}

#[test]
fn replace_program_of_running_supervisor_keeps_it_working() {
    assert_old_supervisor_works_after(|binary| {
        let new = binary.with_extension("new");
        fs::File::create(&new).unwrap().write_all(b"#!/bin/false\n").unwrap();
        fs::rename(&new, binary).unwrap();
    });
}

#[test]
fn remove_program_of_running_supervisor_keeps_it_working() {
    assert_old_supervisor_works_after(|binary| fs::remove_file(binary).unwrap());
}
