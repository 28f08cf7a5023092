//! The header of a qcow2 file.

#[cfg(test)]
mod tests;

use std::io::Read;

use super::{EXTENSION_BACKING_FORMAT, EXTENSION_END, MAGIC};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::store::beneath::Found;
use crate::units::{Bytes, MiB};

/// Incompatible feature bits of the specification as of QEMU 10.
mod feature {
    pub const DIRTY: u64 = 1 << 0;
    pub const CORRUPT: u64 = 1 << 1;
    pub const DATA_FILE: u64 = 1 << 2;
    pub const COMPRESSION: u64 = 1 << 3;
    pub const EXTENDED_L2: u64 = 1 << 4;
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Limits of QEMU's own reader (`block/qcow2.h`), bytes of an L1 table and of a refcount table.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

/// A qcow2 header. Every number was checked against the specification and QEMU's limits. Offsets
/// may still lie outside the file: see [`Header::check_offsets`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 (QEMU's `compat=0.10`) or 3.
    pub version: u32,
    /// Virtual size. At most [`MiB::MAX`].
    pub virtual_size: Bytes,
    /// Binary logarithm of the cluster size in bytes: 9 to 21.
    pub cluster_bits: u32,
    /// Offset of the L1 table, a multiple of the cluster size.
    pub l1_offset: u64,
    /// Entries of the L1 table, at least as many as the virtual size needs.
    pub l1_entries: u32,
    /// Offset of the refcount table, a multiple of the cluster size.
    pub refcount_table_offset: u64,
    /// Length of the refcount table, clusters.
    pub refcount_table_clusters: u32,
    /// Bits of one reference count: 1 to 64.
    pub refcount_bits: u32,
    /// Path of the backing file, as the header names it.
    pub backing_file: Option<String>,
    /// Format of the backing file, if the header states it.
    pub backing_format: Option<String>,
    /// How clusters are encrypted.
    pub encryption: Option<Encryption>,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// The image was not closed: reference counts may be wrong, the data is valid.
    pub dirty: bool,
    /// QEMU found damage and marked the image.
    pub corrupt: bool,
    /// The data is in another file.
    pub external_data_file: bool,
    /// L2 entries have 16 bytes and a bitmap of subclusters.
    pub extended_l2: bool,
}

/// How clusters are encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encryption {
    /// AES-CBC, insecure and deprecated.
    Aes,
    /// LUKS.
    Luks,
}

/// How compressed clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// Why a header is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The file does not start with `QFI\xfb`.
    #[error("no qcow2 magic")]
    Magic,
    /// The file ends within a field.
    #[error("the qcow2 header ends early: {needed} bytes are needed, {have} are there")]
    Truncated {
        /// Bytes required.
        needed: u64,
        /// Bytes present.
        have: u64,
    },
    /// Unknown incompatible feature bits: the data cannot be interpreted without them.
    #[error("qcow2 incompatible features {0:#x} are unknown")]
    Features(u64),
    /// A field has a value that the specification or QEMU does not allow.
    #[error("qcow2 header field '{field}' is {value}: {rule}")]
    Field {
        /// The field's name in the specification.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The values allowed.
        rule: &'static str,
    },
    /// A table or a name lies outside the file or outside its allowed range.
    #[error(
        "the {what} of the qcow2 header lies at {offset}, outside the {length} bytes of {container}"
    )]
    Outside {
        /// The table or name.
        what: &'static str,
        /// Its offset.
        offset: u64,
        /// Length of the container, bytes.
        length: u64,
        /// What should contain it.
        container: &'static str,
    },
}

impl Header {
    /// Bytes at the start of a file that [`Header::parse`] may need. QEMU writes extensions and
    /// names right behind the header; an image that has them further out is rejected.
    pub const PREFIX: usize = 64 * 1024;

    /// Reads the header of `image` and checks that its tables lie within the file.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] with a [`HeaderError`] as source if the header is invalid.
    pub fn read(image: &Found) -> Result<Self> {
        let (path, mut prefix) = (image.path(), Vec::new());
        image.read()?.take(Self::PREFIX as u64).read_to_end(&mut prefix).at("read", path)?;
        let length = image.metadata().len();
        let sound =
            Self::parse(&prefix).and_then(|header| header.check_offsets(length).map(|()| header));
        sound.map_err(|error| {
            Error::new(
                ErrorKind::Corrupt,
                format!("'{}' is not a valid qcow2 image", path.display()),
            )
            .because(error)
        })
    }

    /// Parses a header from the first bytes of a file: all of them, or at least [`Header::PREFIX`].
    pub fn parse(prefix: &[u8]) -> Result<Self, HeaderError> {
        let fields = Fields(&prefix[..prefix.len().min(Self::PREFIX)]);
        if !prefix.starts_with(&MAGIC) {
            return Err(HeaderError::Magic);
        }
        let version = fields.u32(4)?;
        check("version", version.into(), (2..=3).contains(&version), "2 and 3 are known")?;
        let cluster_bits = fields.u32(20)?;
        check(
            "cluster_bits",
            cluster_bits.into(),
            (9..=21).contains(&cluster_bits),
            "9 to 21 are allowed",
        )?;
        let v3 = if version == 3 {
            Version3::parse(fields, cluster_bits)?
        } else {
            Version3::of_version_2()
        };
        let encryption = match fields.u32(32)? {
            0 => None,
            1 => Some(Encryption::Aes),
            2 => Some(Encryption::Luks),
            other => {
                return Err(HeaderError::Field {
                    field: "crypt_method",
                    value: other.into(),
                    rule: "0 to 2",
                });
            }
        };
        let mut header = Self {
            version,
            virtual_size: Bytes(fields.u64(24)?),
            cluster_bits,
            l1_offset: fields.u64(40)?,
            l1_entries: fields.u32(36)?,
            refcount_table_offset: fields.u64(48)?,
            refcount_table_clusters: fields.u32(56)?,
            refcount_bits: 1 << v3.refcount_order,
            backing_file: None,
            backing_format: None,
            encryption,
            compression: v3.compression,
            snapshots: fields.u32(60)?,
            dirty: v3.incompatible & feature::DIRTY != 0,
            corrupt: v3.incompatible & feature::CORRUPT != 0,
            external_data_file: v3.incompatible & feature::DATA_FILE != 0,
            extended_l2: v3.incompatible & feature::EXTENDED_L2 != 0,
        };
        header.check_tables()?;
        header.read_backing(fields, v3.length)?;
        Ok(header)
    }

    /// Size of a cluster, bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Number of entries in an L2 table: the clusters it maps.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / if self.extended_l2 { 16 } else { 8 }
    }

    /// Number of L2 tables, and so of L1 entries, that the virtual size needs.
    pub fn l1_entries_needed(&self) -> u64 {
        self.virtual_size.get().div_ceil(self.cluster_size() * self.l2_entries())
    }

    /// Checks that the tables lie within a file of `length` bytes.
    pub fn check_offsets(&self, length: u64) -> Result<(), HeaderError> {
        let l1 = (self.l1_offset, u64::from(self.l1_entries) * 8, "L1 table");
        let counts = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        for (offset, size, what) in [l1, (self.refcount_table_offset, counts, "refcount table")] {
            if offset.checked_add(size).is_none_or(|end| end > length) {
                return Err(HeaderError::Outside { what, offset, length, container: "the file" });
            }
        }
        Ok(())
    }

    fn check_tables(&self) -> Result<(), HeaderError> {
        let size = self.virtual_size.get();
        check("size", size, size <= MiB::MAX.bytes().get(), "this program supports up to 64 TiB")?;
        let entries = u64::from(self.l1_entries);
        check("l1_size", entries, entries * 8 <= MAX_L1_BYTES, "an L1 table has at most 32 MiB")?;
        check(
            "l1_size",
            entries,
            entries >= self.l1_entries_needed(),
            "too small for the virtual size",
        )?;
        let counts = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        check("refcount_table_clusters", counts, counts > 0, "there is no refcount table")?;
        check(
            "refcount_table_clusters",
            counts,
            counts <= MAX_REFCOUNT_TABLE_BYTES,
            "at most 8 MiB are allowed",
        )?;
        let aligned = |offset: u64| offset.is_multiple_of(self.cluster_size());
        check("l1_table_offset", self.l1_offset, aligned(self.l1_offset), "not cluster-aligned")?;
        let offset = self.refcount_table_offset;
        check("refcount_table_offset", offset, aligned(offset), "not cluster-aligned")
    }

    /// Reads the header extensions and the backing file's name, which must lie in the first
    /// cluster.
    fn read_backing(&mut self, fields: Fields<'_>, header_length: u64) -> Result<(), HeaderError> {
        let (offset, length) = (fields.u64(8)?, u64::from(fields.u32(16)?));
        let mut extensions_end = self.cluster_size().min(fields.0.len() as u64);
        if offset != 0 {
            check("backing_file_size", length, length <= 1023, "at most 1023 bytes are allowed")?;
            let outside = HeaderError::Outside {
                what: "backing file name",
                offset,
                length: self.cluster_size(),
                container: "the first cluster",
            };
            if offset < header_length || offset.saturating_add(length) > self.cluster_size() {
                return Err(outside);
            }
            self.backing_file = Some(text(fields.range(offset, length)?));
            extensions_end = offset;
        }
        self.backing_format = backing_format(fields, header_length, extensions_end)?;
        Ok(())
    }
}

/// Walks the header extensions from `at` to `end`. Each has a type and a length of four bytes each,
/// and data padded to eight bytes.
fn backing_format(
    fields: Fields<'_>,
    mut at: u64,
    end: u64,
) -> Result<Option<String>, HeaderError> {
    let mut found = None;
    while at + 8 <= end {
        let (kind, length) = (fields.u32(at)?, u64::from(fields.u32(at + 4)?));
        if kind == EXTENSION_END {
            break;
        }
        if length > end - at - 8 {
            return Err(HeaderError::Truncated { needed: at + 8 + length, have: end });
        }
        if kind == EXTENSION_BACKING_FORMAT {
            found = Some(text(fields.range(at + 8, length)?));
        }
        at += 8 + length.next_multiple_of(8);
    }
    Ok(found)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn check(
    field: &'static str,
    value: u64,
    allowed: bool,
    rule: &'static str,
) -> Result<(), HeaderError> {
    if allowed { Ok(()) } else { Err(HeaderError::Field { field, value, rule }) }
}

/// Fields that version 3 adds.
struct Version3 {
    incompatible: u64,
    refcount_order: u32,
    length: u64,
    compression: Compression,
}

impl Version3 {
    /// The values that version 2 implies.
    fn of_version_2() -> Self {
        Self { incompatible: 0, refcount_order: 4, length: 72, compression: Compression::Zlib }
    }

    fn parse(fields: Fields<'_>, cluster_bits: u32) -> Result<Self, HeaderError> {
        let incompatible = fields.u64(72)?;
        if incompatible & !feature::KNOWN != 0 {
            return Err(HeaderError::Features(incompatible & !feature::KNOWN));
        }
        let refcount_order = fields.u32(96)?;
        check("refcount_order", refcount_order.into(), refcount_order <= 6, "0 to 6 are allowed")?;
        let length = u64::from(fields.u32(100)?);
        let allowed = length >= 104 && length.is_multiple_of(8) && length <= 1 << cluster_bits;
        check(
            "header_length",
            length,
            allowed,
            "at least 104, a multiple of 8, at most a cluster",
        )?;
        let number = if length > 104 { fields.range(104, 1)?[0] } else { 0 };
        let compression = match (number, incompatible & feature::COMPRESSION != 0) {
            (0, false) => Compression::Zlib,
            (1, true) => Compression::Zstd,
            _ => {
                let rule = "0 (zlib) without, 1 (zstd) with the incompatible feature bit";
                return Err(HeaderError::Field {
                    field: "compression_type",
                    value: number.into(),
                    rule,
                });
            }
        };
        Ok(Self { incompatible, refcount_order, length, compression })
    }
}

/// Reads big-endian numbers from bytes that may be too few.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn range(self, offset: u64, length: u64) -> Result<&'a [u8], HeaderError> {
        let (needed, have) = (offset.saturating_add(length), self.0.len() as u64);
        let missing = HeaderError::Truncated { needed, have };
        if needed > have { Err(missing) } else { Ok(&self.0[offset as usize..needed as usize]) }
    }

    fn array<const N: usize>(self, offset: u64) -> Result<[u8; N], HeaderError> {
        let mut array = [0; N];
        array.copy_from_slice(self.range(offset, N as u64)?);
        Ok(array)
    }

    fn u32(self, offset: u64) -> Result<u32, HeaderError> {
        self.array(offset).map(u32::from_be_bytes)
    }

    fn u64(self, offset: u64) -> Result<u64, HeaderError> {
        self.array(offset).map(u64::from_be_bytes)
    }
}
