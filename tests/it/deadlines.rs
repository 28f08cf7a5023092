//! Every call ends: whatever it waits for, it says so by its deadline, and what to try next.

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
use crate::support::silent::Silent;

/// The deadline of methods that are to fail, seconds.
const DEADLINE: u64 = 3;
/// How much later the answer may come.
const LATE: Duration = Duration::from_secs(5);
/// How long a pool may take to answer (`store::pool`).
const POOL: Duration = Duration::from_secs(10);

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

fn hasty_host(config: Value) -> Option<Host> {
    Host::with(config).inspect(hasty)
}

/// Gives every method time, for what is to succeed however busy the machine is.
fn patient(host: &Host) {
    host.reconfigure(|config| config["deadlines"] = json!({}));
}

fn hasty(host: &Host) {
    host.reconfigure(|config| {
        config["deadlines"] =
            METHODS.iter().map(|method| (method.to_string(), json!(DEADLINE))).collect();
    });
}

/// Copies of disks that were cut short, in a QEMU that does not answer, are left to a later create.
#[test]
fn a_create_does_not_wait_for_leftovers_that_do_not_go() {
    let Some(host) = hasty_host(json!({"qemu": {"hotplug_slots": 4}})) else { return };
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
    assert!(took < Duration::from_secs(DEADLINE) + LATE, "{took:?}");
    qemu.signal(Signal::SIGCONT).unwrap();
    patient(&host);
    host.disk();
    assert_eq!(store.pending_dir().read_dir().unwrap().count(), 0, "the next create settles them");
}

/// The failure of a call, which must come in time, name all of `words`, and say what to do.
fn late(
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
    assert!(took < deadline + LATE, "{method} took {took:?}: {failure:?}");
    for word in words.iter().chain(&["Hint: "]) {
        assert!(failure.message.contains(word), "{method}: {word} in {failure:?}");
    }
    failure
}

/// Calls about a VM whose QEMU answers nothing, each of them. `restore` ends that.
fn every_call_on_a_silent_qemu(silence: impl Fn(&Host, &VmCid) -> Box<dyn FnOnce()>) {
    let Some(host) = hasty_host(json!({})) else { return };
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
        let speak = silence(&host, &vm);
        let socket = host.paths(&vm).qmp();
        late(
            &host,
            method,
            &arguments,
            Duration::from_secs(DEADLINE),
            &[socket.to_str().unwrap(), "did not greet"],
        );
        // What needs no QEMU goes on.
        assert_eq!(host.ok("has_vm", &json!([vm])), true);
        host.ok("get_disks", &json!([vm]));
        host.ok("set_vm_metadata", &json!([vm, {"name": "web/0"}]));
        host.ok("set_disk_metadata", &json!([attached, {}]));
        assert_eq!(host.ok("has_disk", &json!([attached])), true);
        speak();
        patient(&host);
        host.ok(method, &arguments);
        hasty(&host);
    }
    // A VM is ended whatever its QEMU says.
    for (method, arguments) in [("reboot_vm", json!([vm])), ("delete_vm", json!([vm]))] {
        let speak = silence(&host, &vm);
        host.ok(method, &arguments);
        speak();
    }
}

#[test]
fn a_stopped_qemu() {
    every_call_on_a_silent_qemu(|host, vm| {
        let qemu = host.qemu(vm).unwrap();
        qemu.signal(Signal::SIGSTOP).unwrap();
        Box::new(move || drop(qemu.signal(Signal::SIGCONT)))
    });
}

#[test]
fn a_client_that_holds_the_monitor() {
    every_call_on_a_silent_qemu(|host, vm| {
        let silent = UnixStream::connect(host.paths(vm).qmp()).unwrap();
        Box::new(move || drop(silent))
    });
}

#[test]
fn a_qemu_img_that_hangs() {
    let Some(host) = hasty_host(json!({})) else { return };
    let disk = host.disk();
    // One that can not be decoded as it streams by.
    let image = host.path("zstd.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", "compression_type=zstd"])
        .arg(&image)
        .arg("1M")
        .status();
    assert!(made.unwrap().success());
    let before = host.left();
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
        late(&host, method, &arguments, Duration::from_secs(DEADLINE), &words);
        assert_eq!(host.left(), before, "{method} leaves nothing");
    }
    host.reconfigure(|config| {
        config["qemu"].as_object_mut().unwrap().remove("img_binary");
    });
    host.ok("update_disk", &json!([disk, 8, {"format": "raw"}]));
}

#[test]
fn a_pool_whose_server_is_gone() {
    let Some(fast) = Filesystem::new(64) else { return };
    // Without `overcommit`, a create looks at the space of all images there are.
    let config = json!({"pools": {"fast": {"path": fast.path()}}, "overcommit": false});
    let Some(host) = Host::with(config) else { return };
    let stemcell = host.stemcell();
    let in_pool = |host: &Host| text(&host.ok("create_disk", &json!([8, {"pool": "fast"}, null])));
    // One for each call: they wait for each other's locks.
    let [attached, free, copied, small, changed, doomed] = std::array::from_fn(|_| in_pool(&host));
    let mut arguments = host.vm_arguments(&stemcell);
    arguments[2]["pool"] = json!("fast");
    let vm = vm_cid(&host.ok("create_vm", &arguments));
    host.sees(&vm, "BOOTSECTOR-OK", 1);
    host.ok("attach_disk", &json!([vm, attached]));

    let Some(silent) = Silent::over(fast.path()) else { return };
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
            // In the test's own mount namespace, as threads of this one are.
            threads.spawn(|| {
                late(
                    &host,
                    method,
                    arguments,
                    POOL,
                    &["pool 'fast'", fast.path().to_str().unwrap(), "did not answer"],
                )
            });
        }
        // What is elsewhere goes on, and waits once, however many images there are in the pool.
        threads.spawn(|| {
            let began = Instant::now();
            host.disk();
            assert!(began.elapsed() < POOL + LATE, "{:?}", began.elapsed());
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
    drop(silent);
    host.ok("attach_disk", &json!([vm, free]));
    host.ok("delete_disk", &json!([doomed]));
    assert_eq!(host.command(&["audit", "--json"]), (true, json!({"clean": true, "findings": []})));
}

#[test]
fn an_image_whose_server_is_gone() {
    let Some(share) = Filesystem::new(64) else { return };
    let Some(host) = hasty_host(json!({})) else { return };
    let before = host.left();
    let image = share.path().join("image");
    let mut disk = vec![0; 1 << 20];
    disk[..GUEST.len()].copy_from_slice(GUEST);
    fs::write(&image, disk).unwrap();
    let Some(silent) = Silent::over(share.path()) else { return };
    let light = json!({"image_path": image, "sha256": "0".repeat(64)});
    for (path, properties) in [(json!(image), json!({})), (json!("/dev/null"), light)] {
        let words = [image.to_str().unwrap(), "was not read by the deadline"];
        late(
            &host,
            "create_stemcell",
            &json!([path, properties]),
            Duration::from_secs(DEADLINE),
            &words,
        );
        assert_eq!(host.left(), before);
    }
    drop(silent);
    host.ok("create_stemcell", &json!([image, {}]));
}
