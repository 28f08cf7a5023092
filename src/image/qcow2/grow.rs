//! Enlarges a qcow2 image by changing its header alone.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::Header;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::units::Bytes;

/// Offset of `size` in the header. `crypt_method` and `l1_size` follow, in the same sector, which a
/// disk writes atomically.
const SIZE_FIELD: u64 = 24;

/// Enlarges the image in `file`, whose path is `path`. No other process may have it open. The
/// caller syncs the file.
///
/// # Errors
/// [`ErrorKind::NotSupported`], with nothing changed, if the L1 table's clusters have no room for
/// the additional entries.
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
        // The specification does not guarantee zeros after the last entry.
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
