//! Making a qcow2 image larger by its header alone.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::Header;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::units::Bytes;

/// Where `size` is in the header, followed by `crypt_method` and `l1_size`: all in one sector, which a disk writes whole.
const SIZE_FIELD: u64 = 24;

/// Makes the image in `file`, called `path`, larger. Nobody else may have it open; the caller flushes.
///
/// # Errors
/// [`ErrorKind::NotSupported`] before anything is changed if the L1 table's clusters have no room for more entries.
pub fn grow(file: &File, path: &Path, header: &Header, size: Bytes) -> Result<()> {
    let refused = |why: &str| {
        Error::new(ErrorKind::NotSupported, format!("image '{}' {why}", path.display()))
    };
    if header.corrupt || header.snapshots > 0 || header.external_data_file {
        return Err(refused("was not made by this program, or is damaged"));
    }
    let cluster = 1_u64 << header.cluster_bits;
    let entry_bytes: u64 = if header.extended_l2 { 16 } else { 8 };
    let entries = size.get().div_ceil(cluster * (cluster / entry_bytes));
    let had = u64::from(header.l1_entries);
    if entries > had {
        if entries * 8 > (had * 8).next_multiple_of(cluster) {
            return Err(refused("has no room in its L1 table for this size"));
        }
        // What is behind the last entry was never said to be zero.
        let zeros = vec![0; ((entries - had) * 8) as usize];
        file.write_all_at(&zeros, header.l1_offset + had * 8).at("write", path)?;
        file.sync_all().at("flush", path)?;
    }
    let mut fields = [0; 16];
    file.read_exact_at(&mut fields, SIZE_FIELD).at("read", path)?;
    fields[..8].copy_from_slice(&size.get().to_be_bytes());
    fields[12..].copy_from_slice(&(entries.max(had) as u32).to_be_bytes());
    file.write_all_at(&fields, SIZE_FIELD).at("write", path)
}
