//! resize_disk enlarges the guest's device and changes nothing else.

use bosh_qemu_cpi::cid::{DiskCid, VmCid};
use bosh_qemu_cpi::store::DiskRecord;
use serde_json::{Value, json};

use crate::support::host::{Host, text};
use crate::support::images::{assert_pattern, image, node, write_pattern};

fn disk(host: &Host, properties: &Value) -> DiskCid {
    text(&host.ok("create_disk", &json!([8, properties, null]))).parse().unwrap()
}

fn size(host: &Host, disk: &DiskCid) -> u64 {
    host.store().read::<DiskRecord>(disk).unwrap().unwrap().size.get()
}

/// Size of the device in the guest, MiB.
fn seen(host: &Host, vm: &VmCid, disk: &DiskCid) -> u64 {
    node(host, vm, disk).expect("plugged in")["image"]["virtual-size"].as_u64().unwrap() >> 20
}

#[test]
fn resize_disk_attached_detached_or_off_grows_it() {
    let Some(host) = Host::new() else { return };
    let vm = host.booted_vm();
    for properties in [
        json!({}),
        json!({"format": "raw"}),
        json!({"encrypted": true}),
        json!({"format": "raw", "encrypted": true}),
        json!({"preallocation": "full"}),
    ] {
        let disk = disk(&host, &properties);
        write_pattern(&host, &disk);
        assert_eq!(host.ok("resize_disk", &json!([disk, 16])), Value::Null);
        assert_eq!(host.ok("resize_disk", &json!([disk, 16])), Value::Null, "a repeated call");
        host.ok("attach_disk", &json!([vm, disk]));
        assert_eq!(seen(&host, &vm, &disk), 16, "{properties}");
        host.ok("resize_disk", &json!([disk, 600]));
        assert_eq!((seen(&host, &vm, &disk), size(&host, &disk)), (600, 600), "{properties}");
        for shrunk in [8, 599] {
            let answer = host.call("resize_disk", &json!([disk, shrunk]));
            assert_eq!(answer.failure().kind, "NotSupported", "{answer:?}");
        }
        assert_eq!((seen(&host, &vm, &disk), size(&host, &disk)), (600, 600), "{properties}");
        host.ok("detach_disk", &json!([vm, disk]));
        assert_pattern(&host, &disk);
        let answer = host.call("resize_disk", &json!([disk, 16]));
        assert_eq!(answer.failure().kind, "NotSupported", "{answer:?}");
        host.ok("delete_disk", &json!([disk]));
    }
    let disk = disk(&host, &json!({}));
    host.ok("attach_disk", &json!([vm, disk]));
    host.power_off(&vm);
    host.ok("resize_disk", &json!([disk, 64]));
    host.ok("reboot_vm", &json!([vm]));
    assert_eq!(seen(&host, &vm, &disk), 64);
    assert_eq!(
        host.call("resize_disk", &json!(["disk-unknown", 9])).failure().kind,
        "DiskNotFound"
    );
}

#[test]
fn resize_disk_after_killed_resize_finishes_it() {
    let Some(host) = Host::new() else { return };
    let disk = disk(&host, &json!({"format": "raw"}));
    let file = std::fs::OpenOptions::new().write(true).open(image(&host, &disk)).unwrap();
    file.set_len(20 << 20).unwrap();
    let refused = host.call("resize_disk", &json!([disk, 12]));
    assert_eq!(refused.failure().kind, "NotSupported", "a disk does not shrink: {refused:?}");
    host.ok("resize_disk", &json!([disk, 20]));
    assert_eq!(size(&host, &disk), 20);
}

#[test]
fn change_disk_on_unused_host_is_not_found() {
    let Some(host) = Host::new() else { return };
    for (method, arguments) in [
        ("resize_disk", json!(["disk-unknown", 9])),
        ("update_disk", json!(["disk-unknown", 9, {}])),
        ("snapshot_disk", json!(["disk-unknown", {}])),
    ] {
        let refused = host.call(method, &arguments);
        assert_eq!(refused.failure().kind, "DiskNotFound", "{method}: {refused:?}");
    }
}
