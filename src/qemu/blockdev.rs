//! `-blockdev` and disk `-device` options as JSON, so that commas and quotes in values need no
//! escaping.
//!
//! A guest writes raw images and could forge a header, so every driver is named and QEMU probes no
//! format.

use serde_json::{Value, json};

use super::files::{BASE, FileSpec, OpenedFile, ROOT};
use crate::store::record::{Discard, Format, Limits};

/// The one I/O thread of a VM, shared by its disks.
pub const IOTHREAD: &str = "io0";

/// Id of the secret object that decrypts images. It exists only while QEMU opens one.
pub const SECRET: &str = "disk-key";

/// Name of the protocol node below the format node `id`.
pub fn file_node(id: &str) -> String {
    format!("{id}-file")
}

/// The block nodes of the image `opened`, which QEMU opens from fd set `fdset`: protocol node
/// first, format node second. The format node has the image's name.
pub fn nodes(opened: &OpenedFile, fdset: i64) -> [Value; 2] {
    let spec = &opened.spec;
    // Without io_uring: Linux AIO requires O_DIRECT, otherwise a thread pool does the I/O (QEMU
    // docs, `-blockdev`).
    let aio = match (opened.io_uring, opened.direct) {
        (true, _) => "io_uring",
        (false, true) => "native",
        (false, false) => "threads",
    };
    let mut file = json!({
        "driver": "file", "node-name": file_node(&spec.node),
        "filename": format!("/dev/fdset/{fdset}"), "aio": aio,
        "cache": {"direct": opened.direct}, "read-only": !spec.writable,
    });
    let mut format = json!({
        "driver": spec.format.unwrap_or(Format::Raw).as_str(),
        "node-name": spec.node, "file": file_node(&spec.node),
        "cache": {"direct": opened.direct}, "read-only": !spec.writable,
    });
    if spec.writable && spec.discard == Discard::Unmap {
        // The guest's fstrim frees space on the host.
        file["discard"] = "unmap".into();
        format["discard"] = "unmap".into();
        format["detect-zeroes"] = "unmap".into();
    }
    if spec.encrypted {
        encrypt(&mut format, spec.format);
    }
    if spec.format == Some(Format::Qcow2) {
        // An explicit backing node overrides the path in the header.
        format["backing"] = if spec.id == ROOT { BASE.into() } else { Value::Null };
    }
    [file, format]
}

/// Makes the format node decrypt. The qcow2 driver supports LUKS itself; a raw image uses the
/// `luks` driver.
fn encrypt(node: &mut Value, format: Option<Format>) {
    match format {
        Some(Format::Qcow2) => node["encrypt"] = json!({"format": "luks", "key-secret": SECRET}),
        Some(Format::Raw) | None => {
            node["driver"] = "luks".into();
            node["key-secret"] = SECRET.into();
        }
    }
}

/// The virtio-blk device for the image `spec` with the serial `serial`. The caller adds `bus` and
/// `addr`.
pub fn device(spec: &FileSpec, serial: &str) -> Value {
    let id = &spec.id;
    let mut device = json!({
        "driver": "virtio-blk-pci", "id": id, "drive": spec.node, "serial": serial,
        "iothread": IOTHREAD,
    });
    if spec.writable {
        device["write-cache"] = if spec.cache.has_write_cache() { "on" } else { "off" }.into();
    }
    device
}

/// Throttle group of a VM's root and ephemeral disk.
const OWN_DISKS: &str = "own-disks";

/// Like [`throttle`], for a disk that shares its limits with the VM's other own disks.
pub fn throttle_in_group(id: &str, limits: Limits) -> Option<Value> {
    let mut arguments = throttle(id, limits)?;
    arguments["group"] = OWN_DISKS.into();
    Some(arguments)
}

/// Arguments of `block_set_io_throttle` for the device `id`; `None` without limits.
pub fn throttle(id: &str, limits: Limits) -> Option<Value> {
    (limits != Limits::default()).then(|| throttle_or_reset(id, limits))
}

/// Like [`throttle`], but removes the limits that the device may have had.
pub fn throttle_or_reset(id: &str, limits: Limits) -> Value {
    let (iops, bytes) = (limits.iops.unwrap_or(0), limits.mbps.unwrap_or(0) << 20);
    // Zero means no limit. QEMU requires all six values.
    json!({
        "id": format!("/machine/peripheral/{id}/virtio-backend"),
        "bps": bytes, "bps_rd": 0, "bps_wr": 0, "iops": iops, "iops_rd": 0, "iops_wr": 0,
    })
}

/// The `opaque` string of an fd, by which later calls recognize its purpose.
pub fn opaque(id: &str, writable: bool) -> String {
    format!("{}:{id}", if writable { "rdwr" } else { "rdonly" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_root_disk_has_a_backing_file() {
        let backing = |id: &str, format| {
            let spec = FileSpec::image(id, "/x".into(), format, true);
            let [_, node] = nodes(&OpenedFile { spec, direct: true, io_uring: false }, 1);
            node.get("backing").cloned()
        };
        assert_eq!(backing(ROOT, Format::Qcow2), Some(BASE.into()));
        assert_eq!(backing("disk-1", Format::Qcow2), Some(Value::Null), "the header is overridden");
        assert_eq!(backing("disk-1", Format::Raw), None);
    }
}
