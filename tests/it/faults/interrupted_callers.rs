//! Calls that are ended, or whose caller is: half a thing is repaired by whoever comes next, and a create nobody hears of
//! is undone.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

use bosh_qemu_cpi::sys::pidfd::Process;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::host::{GUEST, Host, eventually, request};

/// `gc` until it finds nothing, which may take until an orphaned launch has ended. What is whole, and was not told of, it
/// names and keeps.
fn clean(host: &Host) {
    eventually("gc has nothing to do", || {
        let (_, printed) = host.command(&["gc", "--json"]);
        printed["findings"]
            .as_array()
            .unwrap()
            .iter()
            .all(|finding| finding["kind"] == "untold")
            .then_some(())
    });
}

/// Lets time pass for the lock of a call that ended before its pid was in it: until then it may be anybody's.
fn age_unsigned_locks(host: &Host) {
    let hour_ago = SystemTime::now() - Duration::from_secs(3600);
    for lock in fs::read_dir(host.path("state/locks")).unwrap().map(|entry| entry.unwrap().path()) {
        // A launch that the call has left behind may end, and take its lock along.
        let Ok(lock) = File::open(lock) else { continue };
        if lock.metadata().unwrap().len() == 0 {
            lock.set_modified(hour_ago).unwrap();
        }
    }
}

/// Sends SIGTERM to `method` at so many moments of its life; each time what is left must be what was there before, or the
/// whole thing.
fn told_to_end(method: &str, prepare: impl Fn(&Host, &str) -> Value, undo: impl Fn(&Host)) {
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
        // The moments are the test; none of them is waited for.
        std::thread::sleep(duration * moment / MOMENTS);
        Process::open(call.id() as i32).unwrap().signal(Signal::SIGTERM).unwrap();
        let status = call.wait().unwrap();
        let mut said = String::new();
        call.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        // No answer, or a whole one: never a part, and never an error that is none.
        let answered =
            serde_json::from_str::<Value>(&said).is_ok_and(|answer| answer["error"].is_null());
        assert!(answered || said.is_empty() && status.signal() == Some(15), "{status:?} {said:?}");
        host.track_vms(&said);
        age_unsigned_locks(&host);
        clean(&host);
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
    told_to_end("create_vm", Host::vm_arguments, delete_all_but_stemcells);
}

#[test]
fn terminate_create_disk_leaves_a_whole_disk_or_nothing() {
    // By qemu-img, which must end with its call.
    told_to_end(
        "create_disk",
        |_, _| json!([64, {"preallocation": "full"}, null]),
        delete_all_but_stemcells,
    );
}

#[test]
fn terminate_update_disk_leaves_one_image() {
    let prepare =
        |host: &Host, _: &str| json!([host.disk(), 8, {"format": "raw", "preallocation": "full"}]);
    told_to_end("update_disk", prepare, delete_all_but_stemcells);
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
        let mut call = host.namespace().run(|| {
            let mut command = host.cpi();
            command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        });
        drop(call.stdout.take());
        call.stdin.take().unwrap().write_all(request(method, &arguments).as_bytes()).unwrap();
        let output = call.wait_with_output().unwrap();
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && log.contains("undone: delete"), "{method}: {log}");
        assert_eq!(host.leaks(), before, "{method}");
    }
}
