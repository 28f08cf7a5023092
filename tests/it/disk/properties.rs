//! Cloud properties of disks: QEMU applies them, and the key of encrypted disks is only in its
//! file.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use bosh_qemu_cpi::cid::{Cid, DiskCid, VmCid};
use bosh_qemu_cpi::store::DiskRecord;
use serde_json::{Value, json};

use crate::support::host::{Host, text};

fn disk(host: &Host, properties: &Value) -> DiskCid {
    text(&host.ok("create_disk", &json!([8, properties, null]))).parse().unwrap()
}

fn image(host: &Host, disk: &DiskCid) -> PathBuf {
    let store = host.store();
    store.disk_image(&store.read::<DiskRecord>(disk).unwrap().unwrap()).unwrap()
}

/// QEMU's description of the disk's image; `None` if the disk is not plugged in.
fn inserted(host: &Host, vm: &VmCid, disk: &DiskCid) -> Option<Value> {
    let devices = host.qmp(vm, "query-block", &json!({})).unwrap();
    let mut inserted = devices.as_array().unwrap().iter().map(|device| &device["inserted"]);
    inserted.find(|inserted| inserted["node-name"] == disk.as_str()).cloned()
}

/// Cloud properties with the expected driver, cache.direct, cache.writeback and detect_zeroes of
/// QEMU, and the least number of allocated blocks of 512 bytes.
fn combinations() -> Vec<(Value, &'static str, bool, bool, &'static str, u64)> {
    const ALL: u64 = 8 << 11;
    vec![
        (json!({}), "qcow2", true, true, "unmap", 0),
        (json!({"format": "raw", "cache": "writeback"}), "raw", false, true, "unmap", 0),
        (json!({"cache": "directsync", "discard": "ignore"}), "qcow2", true, false, "off", 0),
        (
            json!({"cache": "writethrough", "iops": 100, "mbps": 9}),
            "qcow2",
            false,
            false,
            "unmap",
            0,
        ),
        (json!({"preallocation": "metadata"}), "qcow2", true, true, "unmap", 0),
        (json!({"preallocation": "falloc"}), "qcow2", true, true, "off", ALL),
        (json!({"format": "raw", "preallocation": "full"}), "raw", true, true, "off", ALL),
        (json!({"encrypted": true}), "qcow2", true, true, "unmap", 0),
        (
            json!({"format": "raw", "encrypted": true, "preallocation": "falloc"}),
            "luks",
            true,
            true,
            "off",
            ALL,
        ),
    ]
}

#[test]
fn attach_disk_applies_every_property_before_and_after_reboot() {
    let combinations = combinations();
    let Some(host) = Host::with(json!({"qemu": {"hotplug_slots": combinations.len()}})) else {
        return;
    };
    let vm = host.booted_vm();
    let disks: Vec<_> =
        combinations.iter().map(|(properties, ..)| disk(&host, properties)).collect();
    let check = |when: &str| {
        for (disk, (properties, driver, direct, writeback, zeroes, blocks)) in
            disks.iter().zip(&combinations)
        {
            let inserted = inserted(&host, &vm, disk).expect("plugged in");
            let printed = format!("{when} {properties}: {inserted:#}");
            assert_eq!(inserted["drv"], *driver, "{printed}");
            assert_eq!(
                inserted["cache"],
                json!({"direct": direct, "writeback": writeback, "no-flush": false}),
                "{printed}"
            );
            assert_eq!(inserted["detect_zeroes"], *zeroes, "{printed}");
            assert_eq!(inserted["encrypted"], json!(properties["encrypted"] == true), "{printed}");
            assert_eq!(inserted["image"]["virtual-size"], 8 << 20, "{printed}");
            let limits = (
                properties["iops"].as_u64().unwrap_or(0),
                properties["mbps"].as_u64().unwrap_or(0) << 20,
            );
            assert_eq!(
                (inserted["iops"].as_u64(), inserted["bps"].as_u64()),
                (Some(limits.0), Some(limits.1)),
                "{printed}"
            );
            let meta = fs::metadata(image(&host, disk)).unwrap();
            assert!(std::os::unix::fs::MetadataExt::blocks(&meta) >= *blocks, "{printed}");
            assert_eq!(meta.permissions().mode() & 0o777, 0o600, "{printed}");
        }
    };
    for (index, disk) in disks.iter().enumerate() {
        host.ok("attach_disk", &json!([vm, disk]));
        host.wait_for_console(&vm, "\nU", index + 1);
    }
    check("plugged in");
    host.ok("reboot_vm", &json!([vm]));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
    check("at boot");
    for disk in &disks {
        host.ok("detach_disk", &json!([vm, disk]));
        assert!(inserted(&host, &vm, disk).is_none());
    }
}

#[test]
fn create_disk_with_invalid_property_names_it_and_leaves_nothing() {
    let Some(host) = Host::with(json!({"disk_defaults": {"preallocation": "full"}})) else {
        return;
    };
    for (properties, property) in [
        (json!({"cache": "unsafe"}), "cache"),
        (json!({"discard": "unmap"}), "discard"),
        (json!({"format": "raw", "preallocation": "metadata"}), "preallocation"),
        (json!({"pool": "nowhere"}), "pool"),
        (json!({"encrypted": "yes"}), "encrypted"),
        (json!({"crypted": true}), "crypted"),
    ] {
        let refused = host.call("create_disk", &json!([8, properties, null]));
        assert_eq!(refused.failure().kind, "CpiError");
        assert!(
            refused.failure().message.contains(&format!("cloud_properties.{property}: ")),
            "{refused:?}"
        );
    }
    assert!(!host.path("state").exists(), "a refused call writes nothing");
}

/// Runs qemu-io commands on an encrypted qcow2 image with the key of the host.
fn qemu_io(host: &Host, disk: &DiskCid, commands: &[&str]) {
    let mut qemu_io = Command::new("qemu-io");
    qemu_io
        .arg("--object")
        .arg(format!("secret,id=k,file={}", host.path("state/disk.key").display()));
    for command in commands {
        qemu_io.args(["-c", command]);
    }
    let options = "driver=qcow2,encrypt.format=luks,encrypt.key-secret=k,file.filename=";
    let output = qemu_io
        .arg("--image-opts")
        .arg(format!("{options}{}", image(host, disk).display()))
        .output()
        .expect("qemu-io");
    let printed = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(
        output.status.success() && !printed.contains("failed") && !printed.contains("can't"),
        "{commands:?}: {printed}"
    );
}

/// Every file below `dir` that contains `needle`.
fn files_with(dir: &Path, needle: &[u8]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            found.extend(files_with(&entry.path(), needle));
        } else if kind.is_file()
            && fs::read(entry.path()).unwrap().windows(needle.len()).any(|part| part == needle)
        {
            found.push(entry.path());
        }
    }
    found
}

#[test]
fn use_encrypted_disk_keeps_its_data_and_leaks_no_key() {
    let Some(host) = Host::with(json!({"log": {"level": "trace"}})) else { return };
    let vm = host.booted_vm();
    let made = host.call("create_disk", &json!([8, {"encrypted": true}, null]));
    let disk: DiskCid = text(made.result()).parse().unwrap();
    let key = fs::read_to_string(host.path("state/disk.key")).unwrap();
    qemu_io(&host, &disk, &["write -P 0xb0 0 64k"]);
    let plain = [0xb0; 512];
    assert!(
        !fs::read(image(&host, &disk)).unwrap().windows(512).any(|part| part == plain),
        "the data is not encrypted"
    );

    let mut printed = vec![made.stderr.clone()];
    let assert_key_not_exposed = |printed: &[String]| {
        let qemu = PathBuf::from(format!("/proc/{}", host.qemu(&vm).unwrap().pid()));
        for file in ["cmdline", "environ"] {
            let bytes = fs::read(qemu.join(file)).unwrap();
            assert!(!String::from_utf8_lossy(&bytes).contains(&key), "{file}");
        }
        let objects = host.qmp(&vm, "qom-list", &json!({"path": "/objects"})).unwrap().to_string();
        assert!(objects.contains("io0") && !objects.contains("disk-key"), "{objects}");
        assert!(printed.iter().all(|text| !text.contains(&key)));
        assert_eq!(files_with(&host.path("state"), key.as_bytes()), [host.path("state/disk.key")]);
    };
    for round in 1..=2 {
        let attached = host.call("attach_disk", &json!([vm, disk]));
        attached.result();
        printed.push(attached.stderr);
        host.wait_for_console(&vm, "\nU", round);
        assert_key_not_exposed(&printed);
        host.ok("detach_disk", &json!([vm, disk]));
    }
    host.ok("attach_disk", &json!([vm, disk]));
    host.ok("reboot_vm", &json!([vm]));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
    assert!(inserted(&host, &vm, &disk).is_some());
    assert_key_not_exposed(&printed);
    // The supervisor restarts the VM.
    host.kill_qemu(&vm);
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 3);
    assert!(inserted(&host, &vm, &disk).is_some());
    assert_key_not_exposed(&printed);
    host.ok("detach_disk", &json!([vm, disk]));
    qemu_io(&host, &disk, &["read -P 0xb0 0 64k"]);
}

#[test]
fn attach_encrypted_disk_without_its_key_is_refused() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    let disk = disk(&host, &json!({"encrypted": true}));
    let (key, aside) = (host.path("state/disk.key"), host.path("aside"));
    let attach = || host.call("attach_disk", &json!([vm, disk]));

    fs::rename(&key, &aside).unwrap();
    for refused in [attach(), host.call("create_disk", &json!([8, {"encrypted": true}, null]))] {
        let message = &refused.failure().message;
        assert!(
            message.contains("disk.key' cannot be read") && message.contains("Hint: restore it"),
            "{message}"
        );
    }
    assert!(!key.exists(), "a second key would not open the first disk");

    fs::write(&key, "0".repeat(64)).unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    let refused = attach();
    let message = &refused.failure().message;
    assert!(message.contains(&format!("disk.key' does not open disk '{disk}'")), "{message}");
    assert!(message.contains("Hint: the disk was made with another key"), "{message}");
    assert_eq!(host.ok("get_disks", &json!([vm])), json!([]));
    let sets = host.qmp(&vm, "query-fdsets", &json!({})).unwrap().to_string();
    assert!(!sets.contains(disk.as_str()), "{sets}");

    fs::rename(&aside, &key).unwrap();
    attach().result();
    fs::rename(&key, &aside).unwrap();
    attach().result();
    let refused = host.call("reboot_vm", &json!([vm]));
    assert!(refused.failure().message.contains("cannot be read"), "{refused:?}");
    fs::write(&key, "0".repeat(64)).unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    let refused = host.call("reboot_vm", &json!([vm]));
    assert!(refused.failure().message.contains("does not open an encrypted disk"), "{refused:?}");
    // The operator may configure the same key at another path.
    host.reconfigure(|config| config["key_file"] = json!(aside));
    host.ok("reboot_vm", &json!([vm]));
    assert!(inserted(&host, &vm, &disk).is_some());
}

#[test]
fn create_encrypted_disk_without_key_of_snapshot_is_refused() {
    let Some(host) = Host::new() else { return };
    let disk = disk(&host, &json!({"encrypted": true}));
    host.ok("snapshot_disk", &json!([disk, {}]));
    host.ok("delete_disk", &json!([disk]));
    fs::remove_file(host.path("state/disk.key")).unwrap();
    let refused = host.call("create_disk", &json!([8, {"encrypted": true}, null]));
    assert!(refused.failure().message.contains("disk.key' cannot be read"), "{refused:?}");
    assert!(!host.path("state/disk.key").exists(), "a second key would not open the snapshot");
}

#[test]
fn get_disks_and_has_disk_follow_the_contract() {
    let Some(host) = Host::new() else { return };
    let vm = host.vm(&host.stemcell());
    let disks = [disk(&host, &json!({})), disk(&host, &json!({"format": "raw"}))];
    let metadata = |disk: &DiskCid| crate::support::disks::metadata(&host, disk);
    for disk in &disks {
        host.ok("attach_disk", &json!([vm, disk]));
        assert_eq!(
            host.ok("set_disk_metadata", &json!([disk, {"director": "d", "attached_at": "now"}])),
            Value::Null
        );
    }
    assert_eq!(host.ok("get_disks", &json!([vm])), json!(disks), "in the order of attaching");
    host.ok("set_disk_metadata", &json!([disks[0], {"director": "e"}]));
    host.ok("detach_disk", &json!([vm, disks[0]]));
    assert_eq!(metadata(&disks[0]), json!({"director": "e"}), "replaced, and kept when detached");
    assert_eq!(metadata(&disks[1]), json!({"director": "d", "attached_at": "now"}));
    host.ok("attach_disk", &json!([vm, disks[0]]));
    assert_eq!(host.ok("get_disks", &json!([vm])), json!([disks[1], disks[0]]));
    host.power_off(&vm);
    assert_eq!(
        host.ok("get_disks", &json!([vm])),
        json!([disks[1], disks[0]]),
        "of a stopped VM, too"
    );
    host.ok("delete_vm", &json!([vm]));
    for disk in &disks {
        assert_eq!(host.ok("has_disk", &json!([disk])), true);
    }
    assert_eq!(metadata(&disks[0]), json!({"director": "e"}));

    let unknown = DiskCid::random();
    assert_eq!(host.ok("has_disk", &json!([unknown])), false);
    assert_eq!(host.ok("delete_disk", &json!([unknown])), Value::Null);
    assert_eq!(
        host.call("set_disk_metadata", &json!([unknown, {}])).failure().kind,
        "DiskNotFound"
    );
    assert_eq!(host.call("get_disks", &json!([vm])).failure().kind, "VMNotFound");
}
