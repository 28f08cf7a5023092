//! Creates empty qcow2 images without a child process, which would cost as much as the CPI call
//! that starts a VM.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{EXTENSION_BACKING_FORMAT, EXTENSION_END, MAGIC};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image::{Format, UnsyncedFile, create_new, keep, raw};
use crate::units::Bytes;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// 2^4 = 16 bits a reference count.
const REFCOUNT_ORDER: u32 = 4;
/// Version 3 with the compression type field and its padding, as QEMU 5.1 and later write it.
const HEADER_LENGTH: u32 = 112;
/// Longest backing file name of the specification, bytes.
const MAX_BACKING_NAME: usize = 1023;

// The layout, in clusters. Each is a hole except for its first bytes.
//   0 header, extensions, backing name   1 refcount table   2 refcount block   3… L1 table
const REFCOUNT_TABLE: u64 = CLUSTER;
const REFCOUNT_BLOCK: u64 = 2 * CLUSTER;
const L1_TABLE: u64 = 3 * CLUSTER;

/// The backing file of an overlay.
#[derive(Debug, Clone, Copy)]
pub struct Backing<'a> {
    /// Its path as written to the header: absolute, or relative to the overlay's directory.
    pub file_name: &'a str,
    /// Its format. QEMU must not probe it: a guest could write a header into a raw image.
    pub format: Format,
}

/// Creates an empty qcow2 image of `size` at `path`, mode 0600: version 3, 64 KiB clusters, 16-bit
/// reference counts, nothing allocated. With `backing` it is an overlay; the backing file is not
/// opened.
///
/// # Errors
/// If `path` exists or cannot be written, or if `size` or the backing file's name is invalid.
pub fn create(path: &Path, size: Bytes, backing: Option<Backing<'_>>) -> Result<UnsyncedFile> {
    raw::ensure_valid_size(path, size)?;
    if backing.is_some_and(|backing| {
        backing.file_name.is_empty() || backing.file_name.len() > MAX_BACKING_NAME
    }) {
        let message = format!(
            "create '{}': the backing file's name must have 1 to 1023 bytes",
            path.display()
        );
        return Err(Error::new(ErrorKind::BadRequest, message));
    }
    // One L2 table maps CLUSTER / 8 clusters.
    let l1_entries = size.get().div_ceil(CLUSTER * (CLUSTER / 8));
    let clusters = L1_TABLE / CLUSTER + (l1_entries * 8).div_ceil(CLUSTER);
    let counts: Vec<u8> = (0..clusters).flat_map(|_| 1u16.to_be_bytes()).collect();

    let new = create_new(path)?;
    let write =
        |offset: u64, bytes: &[u8]| new.as_file().write_all_at(bytes, offset).at("write", path);
    new.as_file().set_len(clusters * CLUSTER).at("set the size of", path)?;
    write(0, &header(size, l1_entries, backing))?;
    write(REFCOUNT_TABLE, &REFCOUNT_BLOCK.to_be_bytes())?;
    write(REFCOUNT_BLOCK, &counts)?;
    Ok(keep(new))
}

fn header(size: Bytes, l1_entries: u64, backing: Option<Backing<'_>>) -> Vec<u8> {
    let extensions = extensions(backing);
    let name = backing.map_or("", |backing| backing.file_name);
    let name_offset =
        if name.is_empty() { 0 } else { u64::from(HEADER_LENGTH) + extensions.len() as u64 };
    let fields = BigEndian(MAGIC.into())
        .u32(3) // version
        .u64(name_offset)
        .u32(name.len() as u32)
        .u32(CLUSTER_BITS)
        .u64(size.get())
        .u32(0) // no encryption
        .u32(l1_entries as u32)
        .u64(L1_TABLE)
        .u64(REFCOUNT_TABLE)
        .u32(1) // clusters of the refcount table
        .u32(0) // snapshots
        .u64(0) // snapshot table
        .u64(0) // incompatible features
        .u64(0) // compatible features
        .u64(0) // autoclear features
        .u32(REFCOUNT_ORDER)
        .u32(HEADER_LENGTH)
        .u64(0); // compression type zlib, padding
    [fields.0.as_slice(), &extensions, name.as_bytes()].concat()
}

fn extensions(backing: Option<Backing<'_>>) -> Vec<u8> {
    let mut extensions = BigEndian(Vec::new());
    if let Some(backing) = backing {
        let format = backing.format.as_str().as_bytes();
        extensions = extensions.u32(EXTENSION_BACKING_FORMAT).u32(format.len() as u32);
        extensions.0.extend_from_slice(format);
        extensions.0.resize(extensions.0.len().next_multiple_of(8), 0);
    }
    extensions.u32(EXTENSION_END).u32(0).0
}

/// A writer of consecutive big-endian fields.
struct BigEndian(Vec<u8>);

impl BigEndian {
    fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;
    use crate::image::testing::{self, qemu_img};
    use crate::units::MiB;

    const SIZES: [Bytes; 5] =
        [Bytes(512), Bytes(1 << 20), Bytes(5 << 30), Bytes((1 << 40) + 512), MiB::MAX.bytes()];

    #[test]
    fn qemu_img_check_accepts_every_size() {
        let dir = tempfile::tempdir().unwrap();
        crate::image::raw::create(&dir.path().join("base.raw"), Bytes(1 << 20))
            .unwrap()
            .sync()
            .unwrap();
        let raw = Backing { file_name: "base.raw", format: Format::Raw };
        for (number, size) in SIZES.into_iter().enumerate() {
            for backing in [None, Some(raw)] {
                let path = dir.path().join(format!("{number}-{}.qcow2", backing.is_some()));
                create(&path, size, backing).unwrap().sync().unwrap();
                qemu_img(["check".as_ref(), "-f".as_ref(), "qcow2".as_ref(), path.as_os_str()]);
                let info = qemu_img(["info".as_ref(), "--output=json".as_ref(), path.as_os_str()]);
                let info: serde_json::Value = serde_json::from_str(&info).unwrap();
                assert_eq!(info["format"], "qcow2");
                assert_eq!(info["virtual-size"], size.get());
                assert_eq!(info["cluster-size"], CLUSTER);
                assert_eq!(
                    info["backing-filename"].as_str(),
                    backing.map(|backing| backing.file_name)
                );
                assert_eq!(info["backing-filename-format"].as_str(), backing.map(|_| "raw"));
                assert_eq!(info["format-specific"]["data"]["compat"], "1.1");
                assert_eq!(info["format-specific"]["data"]["refcount-bits"], 16);
                let header = testing::header(&path);
                assert_eq!(
                    (header.version, header.virtual_size, header.cluster_bits),
                    (3, size, CLUSTER_BITS)
                );
                assert_eq!(
                    header.backing_file.as_deref(),
                    backing.map(|backing| backing.file_name)
                );
                assert_eq!(header.backing_format.as_deref(), backing.map(|_| "raw"));
                let meta = path.metadata().unwrap();
                assert_eq!(meta.permissions().mode() & 0o777, 0o600);
                assert!(meta.blocks() * 512 <= 3 * 4096, "{} blocks for {size}", meta.blocks());
            }
        }
    }

    #[test]
    fn overlay_returns_guest_data_over_the_backing_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("base.raw"), [7; 4096]).unwrap();
        let size = Bytes(1 << 30);
        let backing = Backing { file_name: "base.raw", format: Format::Raw };
        create(&path("overlay.qcow2"), size, Some(backing)).unwrap().sync().unwrap();
        let write = ["-f", "qcow2", "-c", "write -P 9 600M 64k", "-c", "write -P 3 512 512"];
        crate::image::testing::run(
            "qemu-io",
            write.map(Into::into).into_iter().chain([path("overlay.qcow2").into()]),
        );
        qemu_img(["check".as_ref(), path("overlay.qcow2").as_os_str()]);
        qemu_img([
            "convert".as_ref(),
            "-Oraw".as_ref(),
            path("overlay.qcow2").as_os_str(),
            path("out.raw").as_os_str(),
        ]);
        let out = std::fs::File::open(path("out.raw")).unwrap();
        let at = |offset| {
            let mut byte = [0];
            out.read_exact_at(&mut byte, offset).unwrap();
            byte[0]
        };
        assert_eq!(out.metadata().unwrap().len(), size.get());
        assert_eq!(
            [0, 512, 1024, 4096, 600 << 20, (600 << 20) + 65536].map(at),
            [7, 3, 7, 0, 9, 0]
        );
    }

    #[test]
    fn invalid_backing_name_is_refused_and_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("overlay.qcow2");
        for name in [String::new(), "a".repeat(1024)] {
            let backing = Backing { file_name: &name, format: Format::Raw };
            assert_eq!(
                create(&path, Bytes(512), Some(backing)).unwrap_err().kind(),
                ErrorKind::BadRequest
            );
        }
        assert_eq!(create(&path, Bytes(0), None).unwrap_err().kind(), ErrorKind::BadRequest);
        assert!(!path.exists());
        let longest = "a".repeat(1023);
        create(&path, Bytes(512), Some(Backing { file_name: &longest, format: Format::Qcow2 }))
            .unwrap()
            .sync()
            .unwrap();
        assert_eq!(testing::header(&path).backing_file, Some(longest));
        assert!(
            create(&path, Bytes(512), None).unwrap_err().report().contains("exists"),
            "never overwrites"
        );
    }
}
