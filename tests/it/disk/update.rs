//! update_disk changes size, properties and image of a disk. Its data and its cid stay.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use bosh_qemu_cpi::cid::{Cid, DiskCid};
use serde_json::{Value, json};

use crate::support::host::{Host, text};
use crate::support::images::{
    assert_pattern, guest_writes, image, node, qemu_objects, record, write_pattern,
};

/// A host with the pool `fast`, and the configuration of its pools.
fn host() -> Option<(Host, Value)> {
    let host = Host::new()?;
    fs::create_dir(host.path("fast")).unwrap();
    let pools = json!({"fast": {"path": host.path("fast")}});
    host.reconfigure(|config| config["pools"] = pools.clone());
    Some((host, pools))
}

fn disk(host: &Host, properties: &Value) -> DiskCid {
    text(&host.ok("create_disk", &json!([8, properties, null]))).parse().unwrap()
}

/// Names of all images of a disk, in the state directory and in the pool.
fn images(host: &Host, disk: &DiskCid) -> Vec<String> {
    let dirs = [host.store().disk_dir(disk), host.path("fast").join(disk.as_str())];
    let entries = dirs.iter().flat_map(|dir| fs::read_dir(dir).into_iter().flatten().flatten());
    let names = entries.map(|entry| entry.file_name().into_string().unwrap());
    names.filter(|name| name != "disk.json").collect()
}

/// Properties that are set one after the other on the same disk.
const CHANGES: &[&str] = &[
    r#"{"format": "raw"}"#,
    r#"{"format": "raw", "pool": "fast"}"#,
    r#"{"pool": "fast", "encrypted": true}"#,
    r#"{"encrypted": true, "format": "raw"}"#,
    r#"{"preallocation": "full"}"#,
    r#"{}"#,
];

#[test]
fn update_disk_while_detached_copies_it() {
    let Some((host, _)) = host() else { return };
    let disk = disk(&host, &json!({}));
    write_pattern(&host, &disk);
    for (step, change) in CHANGES.iter().enumerate() {
        let properties: Value = serde_json::from_str(change).unwrap();
        let size = 8 + step as u64;
        assert_eq!(
            host.ok("update_disk", &json!([disk, size, properties])),
            Value::Null,
            "{change}"
        );
        let is = record(&host, &disk);
        assert_eq!(json!(is.cloud_properties), properties);
        assert_eq!((is.size.get(), is.inactive_image), (size, None));
        assert_eq!(json!(is.format), properties.get("format").cloned().unwrap_or(json!("qcow2")));
        assert_eq!(is.encrypted, properties["encrypted"] == true);
        assert_eq!(json!(is.pool), properties["pool"]);
        assert_eq!(images(&host, &disk).len(), 1, "{change}");
        assert_pattern(&host, &disk);
        let before = image(&host, &disk);
        host.ok("update_disk", &json!([disk, size, properties]));
        assert_eq!(image(&host, &disk), before, "a repeated call");
    }
    let vm = host.booted_vm();
    host.ok("attach_disk", &json!([vm, disk]));
    host.wait_for_console(&vm, "\nU", 1);
    host.ok("detach_disk", &json!([vm, disk]));
    assert_eq!(qemu_objects(&host, &vm, disk.as_str()), [0; 3]);
}

#[test]
fn update_disk_while_attached_copies_it() {
    let Some((host, _)) = host() else { return };
    let vm = host.booted_vm();
    let disk = disk(&host, &json!({}));
    write_pattern(&host, &disk);
    host.ok("attach_disk", &json!([vm, disk]));
    for (step, change) in CHANGES.iter().enumerate() {
        let properties: Value = serde_json::from_str(change).unwrap();
        let size = 9 + step as u64;
        host.ok("update_disk", &json!([disk, size, properties]));
        let is = record(&host, &disk);
        assert_eq!(
            (is.size.get(), is.inactive_image.clone(), is.generation),
            (size, None, step as u16 + 1)
        );
        assert_eq!(images(&host, &disk).len(), 1, "{change}");
        let blocks = fs::metadata(image(&host, &disk)).unwrap().blocks();
        let is_thin = !(is.preallocation.reserves_space() || is.encrypted);
        assert!(!is_thin || blocks * 512 < 8 << 20, "{change}: {blocks} blocks");
        let node = node(&host, &vm, &disk).expect("plugged in");
        assert_eq!(node["node-name"], is.current().node(&disk), "{change}");
        assert_eq!(node["image"]["virtual-size"], size << 20);
        assert_eq!(qemu_objects(&host, &vm, disk.as_str()), [0, 2, 1], "{change}");
        // Later writes of the guest go to the new image.
        guest_writes(&host, &vm, &disk, &format!("write -P {} 7M 64k", step + 1));
    }
    host.ok("reboot_vm", &json!([vm]));
    host.wait_for_console(&vm, "BOOTSECTOR-OK", 2);
    host.ok("detach_disk", &json!([vm, disk]));
    assert_eq!(qemu_objects(&host, &vm, disk.as_str()), [0; 3]);
    assert_pattern(&host, &disk);
    let last = format!("read -P {} 7M 64k", CHANGES.len());
    crate::support::images::qemu_io(&host, &image(&host, &disk), &record(&host, &disk), &[&last]);
}

#[test]
fn update_disk_while_attached_changes_limits_at_once() {
    let Some((host, _)) = host() else { return };
    let vm = host.booted_vm();
    let disk = disk(&host, &json!({"iops": 100}));
    host.ok("attach_disk", &json!([vm, disk]));
    let seen = || node(&host, &vm, &disk).expect("plugged in");
    host.ok("update_disk", &json!([disk, 8, {"iops": 300, "mbps": 2, "cache": "writethrough"}]));
    assert_eq!((&seen()["iops"], &seen()["bps"]), (&json!(300), &json!(2 << 20)));
    assert_eq!(seen()["cache"]["direct"], true, "an open image keeps its cache");
    host.ok("update_disk", &json!([disk, 8, {"cache": "writethrough"}]));
    assert_eq!((&seen()["iops"], &seen()["bps"]), (&json!(0), &json!(0)));
    host.ok("detach_disk", &json!([vm, disk]));
    host.ok("attach_disk", &json!([vm, disk]));
    assert_eq!(seen()["cache"]["direct"], false);
    assert_eq!(record(&host, &disk).generation, 0, "these changes need no copy");
}

#[test]
fn create_disk_with_name_keeps_it_across_update() {
    let Some((host, _)) = host() else { return };
    let disk = disk(&host, &json!({"name": "dyn1", "format": "raw"}));
    assert_eq!(
        json!(record(&host, &disk).cloud_properties),
        json!({"name": "dyn1", "format": "raw"})
    );
    host.ok("update_disk", &json!([disk, 9, {"name": "dyn1", "format": "qcow2"}]));
    let is = record(&host, &disk);
    assert_eq!(
        (is.image().as_str(), &is.cloud_properties["name"]),
        ("disk-1.qcow2", &json!("dyn1"))
    );
}

#[test]
fn update_disk_with_invalid_arguments_changes_nothing() {
    let Some((host, _)) = host() else { return };
    let disk = disk(&host, &json!({}));
    let before = fs::read(host.store().disk_dir(&disk).join("disk.json")).unwrap();
    let refused = |arguments: Value| host.call("update_disk", &arguments).failure().kind.clone();
    assert_eq!(refused(json!([disk, 7, {"format": "raw"}])), "NotSupported");
    assert_eq!(refused(json!([disk, 9, {"pool": "nowhere"}])), "CpiError");
    assert_eq!(refused(json!([disk, 9, {"formt": "raw"}])), "CpiError");
    assert_eq!(refused(json!([DiskCid::random(), 9, {}])), "DiskNotFound");
    assert_eq!(fs::read(host.store().disk_dir(&disk).join("disk.json")).unwrap(), before);
}

#[test]
fn use_image_that_references_another_file_is_refused() {
    let Some((host, _)) = host() else { return };
    let (vm, secret) = (host.booted_vm(), host.path("secret"));
    fs::write(&secret, vec![0x5e; 8 << 20]).unwrap();
    // A guest that broke out of its QEMU could write such a header into its image.
    let backing = |path: &str| {
        ["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", secret.to_str().unwrap(), path]
            .map(String::from)
            .to_vec()
    };
    let data_file = |path: &str| {
        let options = format!("data_file={},data_file_raw=on", secret.display());
        ["create", "-q", "-f", "qcow2", "-o", &options, path, "8M"].map(String::from).to_vec()
    };
    for forge in [&backing as &dyn Fn(&str) -> Vec<String>, &data_file] {
        let disk = disk(&host, &json!({}));
        let forged = Command::new("qemu-img")
            .args(forge(image(&host, &disk).to_str().unwrap()))
            .status()
            .unwrap();
        assert!(forged.success());
        for (method, arguments) in [
            ("update_disk", json!([disk, 8, {"format": "raw"}])),
            ("update_disk", json!([disk, 8, {"pool": "fast"}])),
            ("attach_disk", json!([vm, disk])),
        ] {
            let refused = host.call(method, &arguments);
            assert!(
                refused.failure().message.contains("no image of this program does"),
                "{refused:?}"
            );
            assert_eq!(images(&host, &disk), ["disk.qcow2"], "{arguments}");
        }
    }
}
