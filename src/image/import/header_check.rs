//! Detects an image's format by its first bytes and rejects what cannot be imported.

use super::invalid_image::InvalidImage;
use crate::image::Format;
use crate::image::qcow2::{self, Header};

/// Images and archives that are neither qcow2 nor raw: offset, magic bytes, name. No disk starts
/// like this: its first sector holds code or is empty.
const FOREIGN: [(usize, &[u8], &str); 12] = [
    (0, b"KDMV", "a VMDK image (VMware)"),
    (0, b"COWD", "a VMDK image (VMware)"),
    (0, b"# Disk DescriptorFile", "a VMDK descriptor (VMware)"),
    (0, b"conectix", "a VHD image (Hyper-V, Azure)"),
    (0, b"vhdxfile", "a VHDX image (Hyper-V)"),
    (0x40, b"\x7f\x10\xda\xbe", "a VDI image (VirtualBox)"),
    (0, b"QED\0", "a QED image"),
    (0, b"\x1f\x8b\x08", "gzip data within gzip data"),
    (0, b"\xfd7zXZ\0", "xz data"),
    (0, b"\x28\xb5\x2f\xfd", "zstd data"),
    (0, b"BZh", "bzip2 data"),
    (0, b"PK\x03\x04", "a zip archive"),
];

/// Detects the format of an image that starts with `head`. Fails unless it is the `declared` one,
/// if any is.
pub(in crate::image) fn detect_format(
    head: &[u8],
    declared: Option<Format>,
) -> Result<Format, InvalidImage> {
    let has = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    if let Some((_, _, name)) = FOREIGN.iter().find(|(at, magic, _)| has(*at, magic)) {
        return Err(InvalidImage::Foreign(name));
    }
    let found = if has(0, &qcow2::MAGIC) { Format::Qcow2 } else { Format::Raw };
    match declared {
        Some(declared) if declared != found => Err(InvalidImage::Declared { declared, found }),
        // Any file could pass as a raw image. BIOS and GPT disks both have this signature.
        None if found == Format::Raw && !has(510, &[0x55, 0xaa]) => Err(InvalidImage::Unknown),
        _ => Ok(found),
    }
}

/// Reads the qcow2 header at the start of `head`. Rejects headers that make `qemu-img` open other
/// files, that hide the data, or that are marked corrupt.
pub(in crate::image) fn check_qcow2_header(head: &[u8]) -> Result<Header, InvalidImage> {
    let header = Header::parse(head)?;
    let refused = [
        (header.backing_file.is_some(), "has a backing file: flatten it first"),
        (header.external_data_file, "keeps its data in another file"),
        (header.encryption.is_some(), "is encrypted"),
        (header.corrupt, "is marked corrupt"),
    ];
    if let Some((_, what)) = refused.into_iter().find(|(applies, _)| *applies) {
        return Err(InvalidImage::Feature(what));
    }
    if header.virtual_size.get() == 0 { Err(InvalidImage::NoSize) } else { Ok(header) }
}
