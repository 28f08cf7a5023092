//! Persistent disks as QEMU and the store have them.

use std::path::Path;
use std::process::Command;

use bosh_qemu_cpi::cid::{Cid, DiskCid, VmCid};
use serde_json::{Value, json};

use super::host::Host;
use super::images::record;

/// Whether the disk is plugged into the VM's QEMU. Its serial must be its cid.
pub fn is_plugged(host: &Host, vm: &VmCid, disk: &DiskCid) -> bool {
    let property = json!({"path": format!("/machine/peripheral/{disk}"), "property": "serial"});
    match host.qmp(vm, "qom-get", &property) {
        Ok(serial) => {
            assert_eq!(serial, disk.as_str());
            true
        }
        Err(_) => false,
    }
}

/// What QEMU has of a disk: whether its device exists, and the number of its block nodes and
/// descriptors.
pub fn disk_in_qemu(host: &Host, vm: &VmCid, disk: &DiskCid) -> (bool, usize, usize) {
    let count = |command: &str, arguments: Value, word: &str| {
        host.qmp(vm, command, &arguments).unwrap().to_string().matches(word).count()
    };
    let nodes =
        count("query-named-block-nodes", json!({"flat": true}), &format!("\"node-name\":\"{disk}"));
    (is_plugged(host, vm, disk), nodes, count("query-fdsets", json!({}), &format!("rdwr:{disk}")))
}

/// Where a disk's image is.
fn image(host: &Host, disk: &DiskCid) -> std::path::PathBuf {
    host.store().disk_dir(disk).join("disk.qcow2")
}

/// Runs commands of qemu-io, which takes QEMU's own lock, on an image.
fn qemu_io(image: &Path, commands: &[&str]) -> String {
    let mut qemu_io = Command::new("qemu-io");
    qemu_io.args(["-f", "qcow2"]);
    for command in commands {
        qemu_io.args(["-c", command]);
    }
    let output = qemu_io.arg(image).output().expect("qemu-io");
    let printed = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && !printed.contains("failed"), "{commands:?}: {printed}");
    printed
}

/// Writes data that [`assert_data`] checks.
pub fn write_data(host: &Host, disk: &DiskCid) {
    qemu_io(&image(host, disk), &["write -P 0xb0 0 64k", "write -P 0x54 5M 64k"]);
}

/// Asserts that the disk holds the data of [`write_data`] and that its image is sound.
pub fn assert_data(host: &Host, disk: &DiskCid) {
    qemu_io(&image(host, disk), &["read -P 0xb0 0 64k", "read -P 0x54 5M 64k", "read -P 0 1M 64k"]);
    let check = Command::new("qemu-img")
        .args(["check", "-q"])
        .arg(image(host, disk))
        .status()
        .expect("qemu-img");
    assert!(check.success());
}

/// The metadata of a disk.
pub fn metadata(host: &Host, disk: &DiskCid) -> Value {
    json!(host.store().disk_metadata(&record(host, disk)).unwrap())
}
