//! Images of persistent disks, read and written without the CPI.

use std::path::{Path, PathBuf};
use std::process::Command;

use bosh_qemu_cpi::cid::{DiskCid, VmCid};
use bosh_qemu_cpi::store::DiskRecord;
use bosh_qemu_cpi::store::record::Format;
use serde_json::{Value, json};

use super::host::Host;

/// The record of a disk.
pub fn record(host: &Host, disk: &DiskCid) -> DiskRecord {
    host.store().read::<DiskRecord>(disk).unwrap().expect("a record")
}

/// The path of a disk's image.
pub fn image(host: &Host, disk: &DiskCid) -> PathBuf {
    host.store().disk_image(&record(host, disk)).unwrap()
}

/// Runs qemu-io commands on an image. qemu-io takes QEMU's own lock on it.
pub fn qemu_io(host: &Host, path: &Path, disk: &DiskRecord, commands: &[&str]) {
    let driver = match (disk.format, disk.encrypted) {
        (Format::Raw, false) => "raw",
        (Format::Raw, true) => "luks,key-secret=key",
        (Format::Qcow2, false) => "qcow2",
        (Format::Qcow2, true) => "qcow2,encrypt.format=luks,encrypt.key-secret=key",
    };
    let mut qemu_io = Command::new("qemu-io");
    if disk.encrypted {
        qemu_io
            .arg("--object")
            .arg(format!("secret,id=key,file={}", host.path("state/disk.key").display()));
    }
    for command in commands {
        qemu_io.args(["-c", command]);
    }
    qemu_io
        .arg("--image-opts")
        .arg(format!("driver={driver},file.driver=file,file.filename={}", path.display()));
    let output = qemu_io.output().expect("qemu-io");
    let printed = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && !printed.contains("failed"), "{commands:?}: {printed}");
}

/// Writes data that [`assert_pattern`] checks. It also writes zeros, because unwritten parts of a
/// LUKS image read as noise.
pub fn write_pattern(host: &Host, disk: &DiskCid) {
    qemu_io(
        host,
        &image(host, disk),
        &record(host, disk),
        &["write -P 0xb0 0 64k", "write -P 0 1M 4M", "write -P 0x54 5M 1M"],
    );
}

/// Asserts that the disk holds the data of [`write_pattern`] and that its image is sound.
pub fn assert_pattern(host: &Host, disk: &DiskCid) {
    assert_pattern_in(host, &image(host, disk), &record(host, disk));
}

/// Asserts the same of the image at `path`, which has the format of `disk`.
pub fn assert_pattern_in(host: &Host, path: &Path, disk: &DiskRecord) {
    qemu_io(host, path, disk, &["read -P 0xb0 0 64k", "read -P 0 1M 4M", "read -P 0x54 5M 1M"]);
    if disk.format == Format::Qcow2 && !disk.encrypted {
        let check = Command::new("qemu-img")
            .args(["check", "-q", "-f", "qcow2"])
            .arg(path)
            .status()
            .expect("qemu-img");
        assert!(check.success());
    }
}

/// Runs a qemu-io command through the disk's device, as its guest would write or read.
pub fn guest_writes(host: &Host, vm: &VmCid, disk: &DiskCid, command: &str) {
    let line = format!("qemu-io -d /machine/peripheral/{disk}/virtio-backend \"{command}\"");
    let printed = host.qmp(vm, "human-monitor-command", &json!({"command-line": line})).unwrap();
    assert!(
        !["rror", "failed"].iter().any(|word| printed.to_string().contains(word)),
        "{command}: {printed}"
    );
}

/// QEMU's description of the block node below the disk's device; `None` if the disk is not plugged
/// in.
pub fn node(host: &Host, vm: &VmCid, disk: &DiskCid) -> Option<Value> {
    let devices = host.qmp(vm, "query-block", &json!({})).unwrap();
    let path = format!("/machine/peripheral/{disk}/virtio-backend");
    devices
        .as_array()
        .unwrap()
        .iter()
        .find(|device| device["qdev"] == path)
        .map(|device| device["inserted"].clone())
}

/// Number of QEMU's block jobs, block nodes and descriptors whose name begins with `name`.
pub fn qemu_objects(host: &Host, vm: &VmCid, name: &str) -> [usize; 3] {
    let count = |command: &str, arguments: Value, word: String| {
        host.qmp(vm, command, &arguments).unwrap().to_string().matches(&word).count()
    };
    [
        count("query-jobs", json!({}), format!("\"id\":\"{name}")),
        count("query-named-block-nodes", json!({"flat": true}), format!("\"node-name\":\"{name}")),
        count("query-fdsets", json!({}), format!("rdwr:{name}")),
    ]
}
