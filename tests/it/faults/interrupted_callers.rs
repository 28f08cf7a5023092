//! Terminated calls and callers. The next call finishes or reverts a half-done call, and a create
//! is undone if its caller cannot read the answer.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant, SystemTime};

use bosh_qemu_cpi::sys::pidfd::Process;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::host::{GUEST, Host, eventually, request};

/// Runs `gc` until only unacknowledged objects are left, which `gc` reports and keeps. This waits
/// for an orphaned launch to end.
fn gc_until_clean(host: &Host) {
    eventually("gc has nothing to do", || {
        let (_, printed) = host.command(&["gc", "--json"]);
        printed["findings"]
            .as_array()
            .unwrap()
            .iter()
            .all(|finding| finding["kind"] == "unacknowledged")
            .then_some(())
    });
}

/// Ages the empty locks by an hour. A call that was terminated before it wrote its pid leaves such
/// a lock, and a new one may belong to any running call.
fn age_empty_locks(host: &Host) {
    let hour_ago = SystemTime::now() - Duration::from_secs(3600);
    for lock in fs::read_dir(host.path("state/locks")).unwrap().map(|entry| entry.unwrap().path()) {
        // An orphaned launch may end meanwhile and remove its lock.
        let Ok(lock) = File::open(lock) else { continue };
        if lock.metadata().unwrap().len() == 0 {
            lock.set_modified(hour_ago).unwrap();
        }
    }
}

/// Sends SIGTERM to `method` at several moments. Each time, the host must be as before or have the
/// whole object.
fn terminate_at_several_moments(
    method: &str,
    prepare: impl Fn(&Host, &str) -> Value,
    undo: impl Fn(&Host),
) {
    const MOMENTS: u32 = 8;
    let Some(host) = Host::new() else { return };
    let stemcell = host.stemcell();
    let before = host.leaks();
    let arguments = prepare(&host, &stemcell);
    let began = Instant::now();
    host.ok(method, &arguments);
    let duration = began.elapsed();
    undo(&host);
    for moment in 0..MOMENTS {
        let arguments = prepare(&host, &stemcell);
        let mut call = host.start(method, &arguments);
        // The test is about arbitrary moments, so it sleeps instead of waiting for an event.
        std::thread::sleep(duration * moment / MOMENTS);
        Process::open(call.id() as i32).unwrap().signal(Signal::SIGTERM).unwrap();
        let status = call.wait().unwrap();
        let mut stdout = String::new();
        call.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
        // Either no answer or a whole successful one.
        let answered =
            serde_json::from_str::<Value>(&stdout).is_ok_and(|answer| answer["error"].is_null());
        assert!(
            answered || stdout.is_empty() && status.signal() == Some(15),
            "{status:?} {stdout:?}"
        );
        host.track_vms(&stdout);
        age_empty_locks(&host);
        gc_until_clean(&host);
        undo(&host);
        assert_eq!(host.leaks_after_exits(), before, "SIGTERM {moment}/{MOMENTS} into {method}");
    }
}

fn delete_all_but_stemcells(host: &Host) {
    let store = host.store();
    for vm in store.list::<bosh_qemu_cpi::store::VmRecord>().unwrap() {
        host.ok("delete_vm", &json!([vm]));
    }
    for disk in store.list::<bosh_qemu_cpi::store::DiskRecord>().unwrap() {
        host.ok("delete_disk", &json!([disk]));
    }
}

#[test]
fn terminate_create_vm_leaves_a_whole_vm_or_nothing() {
    terminate_at_several_moments("create_vm", Host::vm_arguments, delete_all_but_stemcells);
}

#[test]
fn terminate_create_disk_leaves_a_whole_disk_or_nothing() {
    // qemu-img preallocates the image and must end with its call.
    terminate_at_several_moments(
        "create_disk",
        |_, _| json!([64, {"preallocation": "full"}, null]),
        delete_all_but_stemcells,
    );
}

#[test]
fn terminate_update_disk_leaves_one_image() {
    let prepare =
        |host: &Host, _: &str| json!([host.disk(), 8, {"format": "raw", "preallocation": "full"}]);
    terminate_at_several_moments("update_disk", prepare, delete_all_but_stemcells);
}

#[test]
fn create_whose_caller_is_gone_is_undone() {
    let Some(host) = Host::new() else { return };
    let (stemcell, disk) = (host.stemcell(), host.disk());
    let image = host.path("another");
    let mut bytes = vec![1; 1 << 20];
    bytes[..GUEST.len()].copy_from_slice(GUEST);
    std::fs::write(&image, bytes).unwrap();
    let before = host.leaks();
    for (method, arguments) in [
        ("create_stemcell", json!([image, {}])),
        ("create_vm", host.vm_arguments(&stemcell)),
        ("create_disk", json!([8, {}, null])),
        ("snapshot_disk", json!([disk, {}])),
        ("create_network", json!([{"netmask_bits": 24}])),
    ] {
        let mut call = host.namespace().run(|| crate::support::answer::spawn(host.cpi()));
        drop(call.stdout.take());
        call.stdin.take().unwrap().write_all(request(method, &arguments).as_bytes()).unwrap();
        let output = call.wait_with_output().unwrap();
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && log.contains("undone: delete"), "{method}: {log}");
        assert_eq!(host.leaks(), before, "{method}");
    }
}

#[test]
fn create_without_stdout_is_undone() {
    let Some(host) = Host::new() else { return };
    let before = host.leaks();
    for redirection in [">&-", ">/dev/null"] {
        let cpi = host.cpi();
        let mut command = std::process::Command::new("sh");
        command.arg("-c").arg(format!("exec \"$@\" {redirection}")).arg("sh");
        command.arg(cpi.get_program()).args(cpi.get_args()).env_clear();
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let request = request("create_disk", &json!([8, {}, null]));
        let output = crate::support::answer::run(command, request.as_bytes());
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && log.contains("undone: delete_disk"), "{log}");
        assert_eq!(host.leaks(), before, "{redirection}");
    }
}
