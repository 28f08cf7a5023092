//! Full filesystem: guests pause and resume, calls answer NoDiskSpace and leave nothing.

use std::time::Instant;

use bosh_qemu_cpi::cid::{Cid, DiskCid, VmCid};
use bosh_qemu_cpi::store::record::DiskImage;
use bosh_qemu_cpi::store::{DiskRecord, Phase, Rank, SnapshotRecord};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::disks::disk_in_qemu;
use crate::support::host::{Host, WRITING_GUEST, text, vm_cid, wait_for_exit};
use crate::support::images::{image, qemu_io, record};
use crate::support::vm_list::list_when_all_answer;

/// A VM whose guest has filled the filesystem of `host` and is paused.
fn paused_vm(host: &Host) -> VmCid {
    let mut arguments = host.vm_arguments(&host.import(WRITING_GUEST));
    arguments[2]["root_disk"] = json!(64);
    let vm = vm_cid(&host.ok("create_vm", &arguments));
    host.wait_for_event(&vm, "BLOCK_IO_ERROR", 1);
    host.wait_for_event(&vm, "STOP", 1);
    vm
}

#[test]
fn write_on_full_filesystem_pauses_the_guest_until_there_is_space() {
    let Some(host) = Host::on_tmpfs(24) else { return };
    let vm = paused_vm(&host);
    let listed = list_when_all_answer(&host);
    assert_eq!(listed[0]["state"], "paused");
    assert_eq!(listed[0]["reason"], "io-error on root (no space)");
    assert_eq!(host.ok("has_vm", &json!([vm])), true);
    assert_eq!(host.ok("get_disks", &json!([vm])), json!([]));
    let written = |host: &Host| {
        std::fs::read_to_string(host.paths(&vm).console_log()).unwrap().matches("W").count()
    };
    let before = written(&host);
    assert!(before > 10);

    host.tmpfs().grow(128);
    host.wait_for_event(&vm, "resumed", 1);
    host.wait_for_console(&vm, "END", 1);
    // One `W` for each 64 KiB of the disk except the first.
    assert_eq!(written(&host), 1023);
    assert_eq!(list_when_all_answer(&host)[0]["state"], "running");
}

/// The supervisor dies while the guest is paused, so its successor has not seen the I/O error.
#[test]
fn resume_vm_paused_on_enospc_under_new_supervisor_succeeds() {
    let Some(host) = Host::on_tmpfs(24) else { return };
    let vm = paused_vm(&host);
    let supervisor = host.supervisor(&vm).expect("a supervisor");
    supervisor.signal(Signal::SIGKILL).unwrap();
    wait_for_exit(&supervisor);
    // Enough space for a record, but not enough for the guest, which stays paused.
    host.tmpfs().grow(26);
    host.ok("set_vm_metadata", &json!([vm, {}]));
    host.wait_for_event(&vm, "adopted", 1);
    assert_eq!(list_when_all_answer(&host)[0]["reason"], "io-error on root (no space)");
    host.tmpfs().grow(128);
    host.wait_for_event(&vm, "resumed", 1);
    host.wait_for_console(&vm, "END", 1);
}

#[test]
fn reboot_vm_paused_on_enospc_does_not_wait() {
    let Some(host) = Host::on_tmpfs(24) else { return };
    let vm = paused_vm(&host);
    host.tmpfs().grow(26);
    let began = std::time::Instant::now();
    host.ok("reboot_vm", &json!([vm]));
    assert!(began.elapsed().as_secs() < 30, "{:?}", began.elapsed());
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
}

#[test]
fn delete_vm_paused_on_enospc_succeeds() {
    let Some(host) = Host::on_tmpfs(24) else { return };
    let vm = paused_vm(&host);
    host.ok("delete_vm", &json!([vm]));
    assert_eq!(host.ok("has_vm", &json!([vm])), false);
}

/// Calls `method` with 0 free pages, then 5, and so on until it succeeds. Each failure must be
/// NoDiskSpace and leave the host unchanged. Returns the result and the free pages of the last
/// attempt.
fn call_until_space_suffices(host: &Host, method: &str, arguments: &Value) -> (Value, u64) {
    let leaks = || {
        let mut left = host.leaks();
        left.retain(|what| what != "ballast");
        left
    };
    // Whether the VM's record and its QEMU have the disk.
    let attachment = || {
        let vm: VmCid = text(&arguments[0]).parse().unwrap();
        let nodes = host
            .qemu(&vm)
            .map(|_| host.qmp(&vm, "query-named-block-nodes", &json!({"flat": true})).unwrap());
        let in_qemu = nodes.is_some_and(|nodes| nodes.to_string().contains(&text(&arguments[1])));
        (host.ok("get_disks", &json!([vm])), in_qemu)
    };
    let attachment = || matches!(method, "attach_disk" | "detach_disk").then(attachment);
    let before = (leaks(), attachment());
    for free in (0..1000).step_by(5) {
        host.tmpfs().fill(free);
        match host.call(method, arguments).outcome {
            Ok(result) => {
                host.tmpfs().empty();
                return (result, free);
            }
            Err(failure) => {
                assert_eq!(failure.kind, "NoDiskSpace", "with {free} pages: {failure:?}");
                assert_eq!((leaks(), attachment()), before, "with {free} pages free");
            }
        }
    }
    panic!("{method} does not succeed with 4 MB");
}

#[test]
fn call_on_full_filesystem_answers_no_disk_space_and_leaves_nothing() {
    let Some(host) = Host::on_tmpfs(24) else { return };
    let stemcell = host.stemcell();
    let image = host.path("image");
    let bystander = host.vm(&stemcell);
    host.wait_for_console(&bystander, "BOOTSECTOR-OK", 1);
    let mut table = Vec::new();
    let mut walk = |method: &'static str, arguments: Value| {
        let (result, failures) = call_until_space_suffices(&host, method, &arguments);
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
    assert_eq!(disk_in_qemu(&host, &bystander, &cid), (false, 0, 0));
    walk("attach_disk", json!([bystander, disk]));
    assert_eq!(disk_in_qemu(&host, &bystander, &cid), (true, 2, 1));
    assert_eq!(host.ok("get_disks", &json!([bystander])), json!([disk]));
    walk("resize_disk", json!([disk, 10]));
    walk("snapshot_disk", json!([disk, {}]));
    walk("update_disk", json!([disk, 10, {"format": "qcow2"}]));
    assert!(disk_in_qemu(&host, &bystander, &cid).0, "its nodes have another name now");
    let second = walk("create_disk", json!([8, {}, null]));
    walk("attach_disk", json!([bystander, second]));
    assert_eq!(host.ok("get_disks", &json!([bystander])), json!([disk, second]));
    for (gone, left) in [(&disk, json!([second])), (&second, json!([]))] {
        walk("detach_disk", json!([bystander, gone]));
        let cid = text(gone).parse().unwrap();
        assert_eq!(disk_in_qemu(&host, &bystander, &cid), (false, 0, 0));
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
fn snapshot_disk_during_another_copy_respects_its_space() {
    let Some(host) = Host::on_tmpfs(64) else { return };
    let [first, second] = [0, 1].map(|_| -> DiskCid {
        let disk =
            text(&host.ok("create_disk", &json!([8, {"format": "raw"}, null]))).parse().unwrap();
        qemu_io(&host, &image(&host, &disk), &record(&host, &disk), &["write -P 7 0 8M"]);
        disk
    });
    let noted = |cid: &str| std::fs::write(host.store().pending_dir().join(cid), "").unwrap();
    // Space for one copy, but not for two.
    let has_room = |wanted: bool| {
        host.tmpfs().fill((12 << 20) / 4096);
        let outcome = host.call("snapshot_disk", &json!([second, {}])).outcome;
        host.tmpfs().empty();
        match outcome {
            Ok(snapshot) => {
                assert!(wanted && host.ok("delete_snapshot", &json!([snapshot])).is_null());
            }
            Err(failure) => assert!(!wanted && failure.kind == "NoDiskSpace", "{failure:?}"),
        }
    };
    // The state of a snapshot_disk of the first disk before it has copied anything.
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
    // The state of an update_disk of the first disk.
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
fn delete_on_full_filesystem_succeeds() {
    let Some(host) = Host::on_tmpfs(24) else { return };
    let vm = host.booted_vm();
    let disk = host.disk();
    let stemcells = host.store().list::<bosh_qemu_cpi::store::record::StemcellRecord>().unwrap();
    host.tmpfs().fill(0);
    host.ok("delete_vm", &json!([vm]));
    host.tmpfs().fill(0);
    host.ok("delete_disk", &json!([disk]));
    host.tmpfs().fill(0);
    host.ok("delete_stemcell", &json!([stemcells[0]]));
    host.tmpfs().empty();
}

/// Both files have some 100 kB and would fill the filesystem: gzip data of one byte, and a qcow2
/// image with a compressed copy of it.
#[test]
fn create_stemcell_from_image_that_grows_leaves_a_reserve_and_nothing_else() {
    let Some(host) = Host::on_tmpfs(64) else { return };
    host.stemcell();
    let (plain, bomb) = (host.path("plain"), host.path("bomb"));
    let shell = |script: &str| {
        let status = std::process::Command::new("sh")
            .args(["-ec", script, "sh"])
            .args([&plain, &bomb])
            .status()
            .unwrap();
        assert!(status.success(), "{script}");
    };
    let before = host.leaks();
    for overcommit in [true, false] {
        host.reconfigure(|config| config["overcommit"] = json!(overcommit));
        for make in [
            "head -c 100M /dev/zero | tr '\\0' U > $1; gzip -c $1 > $2",
            "qemu-img convert -c -f raw -O qcow2 $1 $2",
            "qemu-img convert -c -f raw -O qcow2 -o compression_type=zstd $1 $2",
        ] {
            shell(make);
            assert!(bomb.metadata().unwrap().len() < 2 << 20);
            let format = if make.starts_with("head") { "raw" } else { "qcow2" };
            let arguments = json!([bomb, {"disk_format": format}]);
            let answer = host.call("create_stemcell", &arguments);
            let refused = answer.failure();
            assert_eq!(refused.kind, "NoDiskSpace", "{refused:?}");
            assert!(refused.message.contains("MiB more"), "{make}: {refused:?}");
            assert_eq!(host.leaks(), before, "{make}");
        }
    }
}
