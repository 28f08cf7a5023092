//! `-blockdev` and disk `-device` options as JSON: a comma or a quote in a value stays a comma or a quote.
//!
//! A guest writes raw images and could forge a header, so every driver is named and nothing is probed.

use serde_json::{Value, json};

use super::files::{BASE, FileNeed, Opened, ROOT};
use crate::store::record::{Discard, Format, Limits};

/// The one I/O thread of a VM, shared by its disks.
pub const IOTHREAD: &str = "io0";

/// The secret object that opens encrypted images. QEMU has it only while it opens one.
pub const SECRET: &str = "disk-key";

/// Name of the protocol node below the format node `id`.
pub fn file_node(id: &str) -> String {
    format!("{id}-file")
}

/// The nodes of the image `opened`, which QEMU finds as descriptor set `fdset`: protocol first, format second. The
/// format node has the image's name.
pub fn nodes(opened: &Opened, fdset: i64) -> [Value; 2] {
    let need = &opened.need;
    // Without io_uring: Linux AIO wants O_DIRECT, and a pool of threads does the same work without (QEMU docs, `-blockdev`).
    let aio = match (opened.io_uring, opened.direct) {
        (true, _) => "io_uring",
        (false, true) => "native",
        (false, false) => "threads",
    };
    let mut file = json!({
        "driver": "file", "node-name": file_node(&need.node), "filename": format!("/dev/fdset/{fdset}"), "aio": aio,
        "cache": {"direct": opened.direct}, "read-only": !need.writable,
    });
    let mut format = json!({
        "driver": need.format.unwrap_or(Format::Raw).as_str(), "node-name": need.node, "file": file_node(&need.node),
        "cache": {"direct": opened.direct}, "read-only": !need.writable,
    });
    if need.writable && need.discard == Discard::Unmap {
        // A guest's fstrim gives the space back to the host.
        file["discard"] = "unmap".into();
        format["discard"] = "unmap".into();
        format["detect-zeroes"] = "unmap".into();
    }
    if need.encrypted {
        encrypt(&mut format, need.format);
    }
    if need.format == Some(Format::Qcow2) {
        // Given here, a path in the header is never followed.
        format["backing"] = if need.id == ROOT { BASE.into() } else { Value::Null };
    }
    [file, format]
}

/// Makes the format node decrypt: qcow2 knows LUKS itself, a raw image is LUKS's own.
fn encrypt(node: &mut Value, format: Option<Format>) {
    match format {
        Some(Format::Qcow2) => node["encrypt"] = json!({"format": "luks", "key-secret": SECRET}),
        Some(Format::Raw) | None => {
            node["driver"] = "luks".into();
            node["key-secret"] = SECRET.into();
        }
    }
}

/// The virtio disk that shows the image `need` to the guest under `serial`; the caller adds `bus` and `addr`.
pub fn device(need: &FileNeed, serial: &str) -> Value {
    let id = &need.id;
    let mut device = json!({
        "driver": "virtio-blk-pci", "id": id, "drive": need.node, "serial": serial, "iothread": IOTHREAD,
    });
    if need.writable {
        device["write-cache"] = if need.cache.has_write_cache() { "on" } else { "off" }.into();
    }
    device
}

/// The throttle group of the disks that are a VM's own.
const OWN_DISKS: &str = "own-disks";

/// As [`throttle`], for a disk that shares its limits with the VM's other own ones.
pub fn throttle_together(id: &str, limits: Limits) -> Option<Value> {
    let mut arguments = throttle(id, limits)?;
    arguments["group"] = OWN_DISKS.into();
    Some(arguments)
}

/// Arguments of `block_set_io_throttle` for the device `id`; `None` if it has no limits.
pub fn throttle(id: &str, limits: Limits) -> Option<Value> {
    (limits != Limits::default()).then(|| throttle_to(id, limits))
}

/// The same for a device that may have other limits.
pub fn throttle_to(id: &str, limits: Limits) -> Value {
    let (iops, bytes) = (limits.iops.unwrap_or(0), limits.mbps.unwrap_or(0) << 20);
    // Zero is no limit; all six must be given.
    json!({
        "id": format!("/machine/peripheral/{id}/virtio-backend"), "bps": bytes, "bps_rd": 0, "bps_wr": 0, "iops": iops, "iops_rd": 0, "iops_wr": 0,
    })
}

/// Name of the descriptor set's entry, by which a later call recognizes what it is for.
pub fn opaque(id: &str, writable: bool) -> String {
    format!("{}:{id}", if writable { "rdwr" } else { "rdonly" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_image_has_a_backing_file_but_the_root_disk() {
        let backing = |id: &str, format| {
            let need = FileNeed::image(id, "/x".into(), format, true);
            let [_, node] = nodes(&Opened { need, direct: true, io_uring: false }, 1);
            node.get("backing").cloned()
        };
        assert_eq!(backing(ROOT, Format::Qcow2), Some(BASE.into()));
        assert_eq!(backing("disk-1", Format::Qcow2), Some(Value::Null), "not what a header says");
        assert_eq!(backing("disk-1", Format::Raw), None);
    }
}
