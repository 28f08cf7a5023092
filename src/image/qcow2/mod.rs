//! qcow2 images (QEMU's `docs/interop/qcow2.txt`): headers, empty images, stream decoding,
//! table walks, enlarging.
//!
//! ```text
//! header ─▶ L1 table ─▶ L2 tables ─▶ clusters        all numbers big endian
//!    │        8 bytes per L2 table      a cluster has 2^cluster_bits bytes, an L2 table fills one,
//!    │                                  so one L2 table maps cluster_size / 8 clusters of the disk
//!    └────▶ refcount table ─▶ refcount blocks        one count per cluster of the file
//! ```

mod create;
pub(super) mod decode;
mod grow;
mod header;
pub(super) mod map;

pub use create::{Backing, create};
pub use grow::grow;
pub use header::{Compression, Encryption, Header, HeaderError};

/// The first four bytes of every qcow2 file.
pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Header extension: the name of the backing file's format.
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Header extension: end of the extensions.
const EXTENSION_END: u32 = 0;
