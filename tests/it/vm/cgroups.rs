//! Control groups of VMs: their processes, their limits, and a VM that exceeds them.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use bosh_qemu_cpi::cid::{DiskCid, VmCid};
use bosh_qemu_cpi::supervisor::{Ending, ExitRecord};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::host::{Host, eventually, vm_cid, wait_for_exit};
use crate::support::images::{assert_pattern, image, record, write_pattern};
use crate::support::skip;

const MIB: u64 = 1 << 20;

/// A file of the control group of process `pid`, by its names in v1 and v2. `None` if the host
/// lacks the controller.
fn file(pid: i32, controller: &str, v1: &str, v2: &str) -> Option<PathBuf> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let path = |line: &str| line.rsplit(':').next().unwrap().trim_start_matches('/').to_owned();
    let mine = groups
        .lines()
        .find(|line| line.split(':').nth(1).unwrap().split(',').any(|name| name == controller));
    let legacy =
        mine.map(|line| PathBuf::from("/sys/fs/cgroup").join(controller).join(path(line)).join(v1));
    let unified = groups.lines().find(|line| line.starts_with("0::"));
    let unified = unified.map(|line| PathBuf::from("/sys/fs/cgroup").join(path(line)).join(v2));
    [legacy, unified].into_iter().flatten().find(|file| file.exists())
}

fn number(file: &PathBuf) -> u64 {
    fs::read_to_string(file).unwrap().trim().parse().unwrap()
}

fn memory_limit(pid: i32) -> Option<PathBuf> {
    file(pid, "memory", "memory.limit_in_bytes", "memory.max")
}

/// Whether a process may lower its own `oom_score_adj`, which needs CAP_SYS_RESOURCE.
fn can_lower_oom_score() -> bool {
    let spare = "echo -1 > /proc/self/oom_score_adj";
    Command::new("sh").args(["-c", spare]).stderr(Stdio::null()).status().unwrap().success()
}

#[test]
fn create_vm_sets_limits_in_a_cgroup_of_its_own() {
    let Some(host) = Host::new() else { return };
    let mut arguments = host.vm_arguments(&host.stemcell());
    arguments[2] =
        json!({"ram": 64, "ephemeral_disk": 64, "cpu_weight": 200, "iops": 150, "mbps": 5});
    let vm = vm_cid(&host.ok("create_vm", &arguments));
    let (qemu, supervisor) = (host.qemu(&vm).unwrap().pid(), host.supervisor(&vm).unwrap().pid());

    let disks = host.qmp(&vm, "query-block", &json!({})).unwrap();
    let limited = |disk: &&Value| disk["inserted"]["group"] == "own-disks";
    let limited: Vec<_> =
        disks.as_array().unwrap().iter().filter(limited).map(|disk| &disk["inserted"]).collect();
    assert_eq!(limited.len(), 2, "root and ephemeral disk: {disks}");
    assert!(
        limited.iter().all(|disk| disk["iops"] == 150 && disk["bps"] == 5 * MIB),
        "{limited:?}"
    );

    let adjustment =
        |pid| fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().to_owned();
    // Root may lack that capability here.
    let spared = if can_lower_oom_score() { "-900" } else { "0" };
    assert_eq!([adjustment(qemu), adjustment(supervisor)], ["0", spared]);

    let groups = |pid: i32| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert_eq!(groups(qemu), groups(supervisor));
    let Some(memory) =
        memory_limit(qemu).filter(|file| file.to_str().unwrap().contains(vm.to_string().as_str()))
    else {
        return skip("no control group with a memory limit can be made on this host");
    };
    // MiB for translated code of the emulation, 6 images, QEMU, the guest and its page tables.
    assert_eq!(number(&memory), (1024 + 6 * 48 + 256 + 64 + 2) * MIB);
    assert_eq!(number(&file(qemu, "pids", "pids.max", "pids.max").unwrap()), 1025);
    let weight = file(qemu, "cpu", "cpu.shares", "cpu.weight").unwrap();
    assert_eq!(number(&weight), if weight.ends_with("cpu.weight") { 200 } else { 2048 });

    // The next supervisor joins the same group, because the caller's group may end at any time.
    let process = host.supervisor(&vm).unwrap();
    process.signal(Signal::SIGKILL).unwrap();
    wait_for_exit(&process);
    host.ok("set_vm_metadata", &json!([vm, {}]));
    assert_eq!(groups(host.supervisor(&vm).expect("a new one").pid()), groups(qemu));
}

/// The run directory of a running VM is removed, so only its control groups name its processes.
#[test]
fn reboot_vm_without_run_directory_ends_its_old_qemu() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let (qemu, supervisor) = (host.qemu(&vm).unwrap(), host.supervisor(&vm).unwrap());
    if memory_limit(qemu.pid())
        .is_none_or(|file| !file.to_str().unwrap().contains(vm.to_string().as_str()))
    {
        return skip("no control group can be made on this host");
    }
    let [disk, other] = [host.disk(), host.disk()];
    write_pattern(&host, &disk);
    host.ok("attach_disk", &json!([vm, disk]));
    fs::remove_dir_all(host.paths(&vm).run).unwrap();
    assert_calls_on_its_disks_refused(&host, &vm, &disk, &other);
    let (_, found) = host.command(&["audit", "--json"]);
    let found = found["findings"].as_array().unwrap();
    assert!(
        found.len() == 1 && found[0]["why"].as_str().unwrap().contains(&qemu.pid().to_string()),
        "{found:?}"
    );
    // `host start` does not end such a guest.
    let (well, started) = host.command(&["host", "start", "--json"]);
    assert!(!well && started.to_string().contains("has no pid file"), "{started}");
    let taps = host
        .record(&vm)
        .nics
        .iter()
        .filter_map(|nic| nic.tap())
        .map(|(tap, _)| tap.to_string())
        .collect::<Vec<_>>();
    assert!(taps.iter().all(|tap| host.namespace().link(tap).is_some()), "{taps:?}");
    assert!(!qemu.wait_exit(std::time::Instant::now()).unwrap());
    host.ok("reboot_vm", &json!([vm]));
    wait_for_exit(&qemu);
    wait_for_exit(&supervisor);
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
    assert!(host.command(&["audit", "--json"]).0);
    host.ok("attach_disk", &json!([vm, other]));
    host.ok("detach_disk", &json!([vm, disk]));
    assert_pattern(&host, &disk);
}

/// Asserts that calls on its disks are refused: its QEMU has them open, although no pid file
/// exists.
fn assert_calls_on_its_disks_refused(host: &Host, vm: &VmCid, disk: &DiskCid, other: &DiskCid) {
    let state = |disk: &DiskCid| (fs::read(image(host, disk)).unwrap(), json!(record(host, disk)));
    let (before, vm_before) = ([disk, other].map(state), json!(host.record(vm)));
    for (method, arguments) in [
        ("attach_disk", json!([vm, other])),
        ("attach_disk", json!([vm, disk])),
        ("detach_disk", json!([vm, disk])),
        ("resize_disk", json!([disk, 16])),
        ("update_disk", json!([disk, 8, {"format": "raw"}])),
        ("update_disk", json!([disk, 8, {"iops": 100}])),
        ("snapshot_disk", json!([disk, {}])),
        ("delete_disk", json!([disk])),
    ] {
        let refused = host.call(method, &arguments).outcome.expect_err(method);
        let why = if method == "delete_disk" { "is attached to VM" } else { "has no pid file" };
        assert!(refused.message.contains(why), "{method}: {refused:?}");
        assert_eq!(
            host.store().pending_dir().read_dir().unwrap().count(),
            0,
            "{method} leaves no note"
        );
    }
    assert_eq!(json!(host.record(vm)), vm_before);
    assert!([disk, other].map(state) == before, "images and records are unchanged");
}

#[test]
fn exceed_memory_limit_restarts_only_that_vm() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let (wild, other) = (host.vm(&stemcell), host.vm(&stemcell));
    host.wait_for_console(&wild, "BOOTSECTOR-OK", 1);
    let (qemu, supervisor) = (host.qemu(&wild).unwrap(), host.supervisor(&wild).unwrap().pid());
    let bystander = host.qemu(&other).unwrap().pid();
    let Some(limit) =
        memory_limit(qemu.pid()).filter(|file| file.to_str().unwrap().contains(&wild.to_string()))
    else {
        return skip("no control group with a memory limit can be made on this host");
    };
    let used =
        number(&file(qemu.pid(), "memory", "memory.usage_in_bytes", "memory.current").unwrap());
    let meant = number(&limit);
    fs::write(&limit, (used + 16 * MIB).to_string()).unwrap();
    // Memory that is allocated and written, as by a QEMU with a leak.
    let leak = json!({
        "qom-type": "memory-backend-ram", "id": "leak", "size": 256 * MIB, "prealloc": true,
    });
    let _ = host.qmp(&wild, "object-add", &leak);
    wait_for_exit(&qemu);
    host.wait_for_event(&wild, "out of memory", 1);
    let exit =
        eventually("the exit is recorded", || ExitRecord::read(&host.paths(&wild).exit()).unwrap());
    assert_eq!(
        (exit.signal, exit.reason.as_deref(), exit.ending()),
        (Some(9), Some("oom-kill"), Ending::Crashed)
    );

    host.wait_for_console(&wild, "BOOTSECTOR-OK", 2);
    assert_eq!(host.supervisor(&wild).unwrap().pid(), supervisor, "the supervisor is spared");
    assert_eq!(host.qemu(&other).unwrap().pid(), bystander, "other VMs are spared");
    assert_eq!(number(&limit), meant, "the next start restores the limit");
    // Another kind of exit is not reported as an OOM kill.
    host.kill_qemu(&other);
    let exit = eventually("the exit is recorded", || {
        ExitRecord::read(&host.paths(&other).exit()).unwrap()
    });
    assert_eq!((exit.signal, exit.reason), (Some(9), None));
}
