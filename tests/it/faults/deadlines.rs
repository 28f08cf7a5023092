//! Every call ends by its deadline, names what it waited for, and says what to try next.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use bosh_qemu_cpi::cid::VmCid;
use bosh_qemu_cpi::store::DiskRecord;
use bosh_qemu_cpi::store::record::DiskImage;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::answer::Failure;
use crate::support::filesystem::Filesystem;
use crate::support::host::{GUEST, Host, text, vm_cid};
use crate::support::hung_filesystem::HungFilesystem;

/// Deadline of the methods that must fail, seconds.
const DEADLINE_SECS: u64 = 3;
/// Longest delay of an answer after the deadline.
const ANSWER_DELAY: Duration = Duration::from_secs(5);
/// Longest time that a pool may take to answer (`store::pool`).
const POOL_TIMEOUT: Duration = Duration::from_secs(10);

const METHODS: [&str; 8] = [
    "attach_disk",
    "detach_disk",
    "snapshot_disk",
    "resize_disk",
    "update_disk",
    "create_disk",
    "delete_disk",
    "create_stemcell",
];

fn host_with_short_deadlines(config: Value) -> Option<Host> {
    Host::with(config).inspect(set_short_deadlines)
}

/// Restores the default deadlines, for calls that must succeed on a busy machine.
fn set_default_deadlines(host: &Host) {
    host.reconfigure(|config| config["deadlines"] = json!({}));
}

fn set_short_deadlines(host: &Host) {
    host.reconfigure(|config| {
        config["deadlines"] =
            METHODS.iter().map(|method| (method.to_string(), json!(DEADLINE_SECS))).collect();
    });
}

/// Unfinished copies of disks whose QEMU does not answer are left to a later create.
#[test]
fn create_disk_with_unrecoverable_copies_does_not_wait() {
    let Some(host) = host_with_short_deadlines(json!({"qemu": {"hotplug_slots": 4}})) else {
        return;
    };
    let vm = host.booted_vm();
    let store = host.store();
    for _ in 0..3 {
        let disk = host.disk();
        host.ok("attach_disk", &json!([vm, disk]));
        let record = store.read::<DiskRecord>(&disk).unwrap().unwrap();
        let copy = DiskImage { generation: 1, ..record.current() };
        store.write(&DiskRecord { inactive_image: Some(copy), ..record }).unwrap();
        symlink("999999999", store.pending_dir().join(&disk)).unwrap();
    }
    let qemu = host.qemu(&vm).unwrap();
    qemu.signal(Signal::SIGSTOP).unwrap();
    let began = Instant::now();
    host.disk();
    let took = began.elapsed();
    assert!(took < Duration::from_secs(DEADLINE_SECS) + ANSWER_DELAY, "{took:?}");
    qemu.signal(Signal::SIGCONT).unwrap();
    set_default_deadlines(&host);
    host.disk();
    assert_eq!(store.pending_dir().read_dir().unwrap().count(), 0, "the next create settles them");
}

/// Makes a call that must fail by `deadline`, name all of `words` and give a hint.
fn fails_in_time(
    host: &Host,
    method: &str,
    arguments: &Value,
    deadline: Duration,
    words: &[&str],
) -> Failure {
    let began = Instant::now();
    let answer = host.call(method, arguments);
    let took = began.elapsed();
    let failure = answer.failure().clone();
    assert!(took < deadline + ANSWER_DELAY, "{method} took {took:?}: {failure:?}");
    for word in words.iter().chain(&["Hint: "]) {
        assert!(failure.message.contains(word), "{method}: {word} in {failure:?}");
    }
    failure
}

/// Makes each call about a VM whose QEMU does not answer. `hang` makes it so and returns a
/// closure that reverts it.
fn every_call_with_hung_qemu(hang: impl Fn(&Host, &VmCid) -> Box<dyn FnOnce()>) {
    let Some(host) = host_with_short_deadlines(json!({})) else { return };
    let vm = host.booted_vm();
    let [free, attached] = [host.disk(), host.disk()];
    host.ok("attach_disk", &json!([vm, attached]));
    let calls = [
        ("attach_disk", json!([vm, free])),
        ("snapshot_disk", json!([attached, {}])),
        ("resize_disk", json!([attached, 16])),
        ("update_disk", json!([attached, 16, {"format": "raw"}])),
        ("detach_disk", json!([vm, attached])),
    ];
    for (method, arguments) in calls {
        let revert = hang(&host, &vm);
        let socket = host.paths(&vm).qmp();
        fails_in_time(
            &host,
            method,
            &arguments,
            Duration::from_secs(DEADLINE_SECS),
            &[socket.to_str().unwrap(), "did not greet"],
        );
        // Calls that need no QEMU work.
        assert_eq!(host.ok("has_vm", &json!([vm])), true);
        host.ok("get_disks", &json!([vm]));
        host.ok("set_vm_metadata", &json!([vm, {"name": "web/0"}]));
        host.ok("set_disk_metadata", &json!([attached, {}]));
        assert_eq!(host.ok("has_disk", &json!([attached])), true);
        revert();
        set_default_deadlines(&host);
        host.ok(method, &arguments);
        set_short_deadlines(&host);
    }
    // reboot_vm and delete_vm end the VM even if its QEMU does not answer.
    for (method, arguments) in [("reboot_vm", json!([vm])), ("delete_vm", json!([vm]))] {
        let revert = hang(&host, &vm);
        host.ok(method, &arguments);
        revert();
    }
}

#[test]
fn call_with_stopped_qemu_fails_at_its_deadline() {
    every_call_with_hung_qemu(|host, vm| {
        let qemu = host.qemu(vm).unwrap();
        qemu.signal(Signal::SIGSTOP).unwrap();
        Box::new(move || drop(qemu.signal(Signal::SIGCONT)))
    });
}

#[test]
fn call_with_held_monitor_fails_at_its_deadline() {
    every_call_with_hung_qemu(|host, vm| {
        let hung = UnixStream::connect(host.paths(vm).qmp()).unwrap();
        Box::new(move || drop(hung))
    });
}

#[test]
fn call_with_hung_qemu_img_fails_at_its_deadline() {
    let Some(host) = host_with_short_deadlines(json!({})) else { return };
    let disk = host.disk();
    // An image that must be converted by qemu-img, because it cannot be decoded as a stream.
    let image = host.path("zstd.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", "compression_type=zstd"])
        .arg(&image)
        .arg("1M")
        .status();
    assert!(made.unwrap().success());
    let before = host.leaks();
    let program = host.path("qemu-img");
    fs::write(&program, "#!/bin/sh\nexec sleep 1000\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    host.reconfigure(|config| config["qemu"]["img_binary"] = json!(program));
    for (method, arguments) in [
        ("create_disk", json!([8, {"preallocation": "falloc"}, null])),
        ("update_disk", json!([disk, 8, {"format": "raw"}])),
        ("create_stemcell", json!([image, {}])),
    ] {
        let words = [program.to_str().unwrap(), "was killed at its deadline"];
        fails_in_time(&host, method, &arguments, Duration::from_secs(DEADLINE_SECS), &words);
        assert_eq!(host.leaks(), before, "{method} leaves nothing");
    }
    host.reconfigure(|config| {
        config["qemu"].as_object_mut().unwrap().remove("img_binary");
    });
    host.ok("update_disk", &json!([disk, 8, {"format": "raw"}]));
}

#[test]
fn call_on_hung_pool_fails_at_its_timeout() {
    let Some(fast) = Filesystem::new(64) else { return };
    // Without `overcommit`, a create reads the space of all images.
    let config = json!({"pools": {"fast": {"path": fast.path()}}, "overcommit": false});
    let Some(host) = Host::with(config) else { return };
    let stemcell = host.stemcell();
    let in_pool = |host: &Host| text(&host.ok("create_disk", &json!([8, {"pool": "fast"}, null])));
    // One disk for each call, because calls on one disk wait for its lock.
    let [attached, free, copied, small, changed, doomed] = std::array::from_fn(|_| in_pool(&host));
    let mut arguments = host.vm_arguments(&stemcell);
    arguments[2]["pool"] = json!("fast");
    let vm = vm_cid(&host.ok("create_vm", &arguments));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 1);
    host.ok("attach_disk", &json!([vm, attached]));

    let Some(hung) = HungFilesystem::over(fast.path()) else { return };
    let mut another = host.vm_arguments(&stemcell);
    another[2]["pool"] = json!("fast");
    let calls = [
        ("create_disk", json!([8, {"pool": "fast"}, null])),
        ("attach_disk", json!([vm, free])),
        ("snapshot_disk", json!([copied, {}])),
        ("resize_disk", json!([small, 16])),
        ("update_disk", json!([changed, 16, {}])),
        ("delete_disk", json!([doomed])),
        ("create_vm", another),
    ];
    std::thread::scope(|threads| {
        for (method, arguments) in &calls {
            // Threads of the test share its mount namespace.
            threads.spawn(|| {
                fails_in_time(
                    &host,
                    method,
                    arguments,
                    POOL_TIMEOUT,
                    &["pool 'fast'", fast.path().to_str().unwrap(), "did not answer"],
                )
            });
        }
        // A disk outside the pool can be created. The call waits for the pool once, not once per
        // image.
        threads.spawn(|| {
            let began = Instant::now();
            host.disk();
            assert!(began.elapsed() < POOL_TIMEOUT + ANSWER_DELAY, "{:?}", began.elapsed());
        });
        threads.spawn(|| {
            let (passed, pools) = host.command(&["pool", "list", "--json"]);
            assert!(
                !passed && pools[1]["error"].as_str().unwrap().contains("did not answer"),
                "{pools}"
            );
        });
        assert_eq!(host.ok("has_vm", &json!([vm])), true);
        assert_eq!(host.ok("get_disks", &json!([vm])), json!([attached]));
    });
    assert!(host.qemu(&vm).is_some());
    drop(hung);
    host.ok("attach_disk", &json!([vm, free]));
    host.ok("delete_disk", &json!([doomed]));
    assert_eq!(host.command(&["audit", "--json"]), (true, json!({"clean": true, "findings": []})));
}

#[test]
fn create_stemcell_from_hung_filesystem_fails_at_its_deadline() {
    let Some(share) = Filesystem::new(64) else { return };
    let Some(host) = host_with_short_deadlines(json!({})) else { return };
    let before = host.leaks();
    let image = share.path().join("image");
    let mut disk = vec![0; 1 << 20];
    disk[..GUEST.len()].copy_from_slice(GUEST);
    fs::write(&image, disk).unwrap();
    let Some(hung) = HungFilesystem::over(share.path()) else { return };
    let light = json!({"image_path": image, "sha256": "0".repeat(64)});
    for (path, properties) in [(json!(image), json!({})), (json!("/dev/null"), light)] {
        let words = [image.to_str().unwrap(), "was not read by the deadline"];
        fails_in_time(
            &host,
            "create_stemcell",
            &json!([path, properties]),
            Duration::from_secs(DEADLINE_SECS),
            &words,
        );
        assert_eq!(host.leaks(), before);
    }
    drop(hung);
    host.ok("create_stemcell", &json!([image, {}]));
}
