//! Walks the tables of a qcow2 file before `qemu-img` reads it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use super::Header;
use super::decode::{DecodeError, check_entry, compressed, entry};
use crate::units::Bytes;

/// Most clusters that a file may map, of 8 bytes each in memory. With clusters of 64 KiB, QEMU's
/// default, that is 1 TiB of data.
const CLUSTER_LIMIT: usize = 1 << 24;

/// Size of the data that `file`, with the header `header`, maps: the most that its raw image takes.
///
/// # Errors
/// [`DecodeError::Damaged`] if a table or cluster lies outside the file, [`DecodeError::Shared`] if
/// two entries name one, [`DecodeError::TooManyClusters`].
pub fn mapped_size(header: &Header, file: &File, deadline: Instant) -> Result<Bytes, DecodeError> {
    let length = file.metadata().map_err(DecodeError::Read)?.len();
    let (mut tables, mut data) = (Vec::new(), Vec::new());
    let l1 = read(file, header.l1_offset, header.l1_entries_needed() * 8, "the L1 table ends")?;
    for (number, value) in (0..).zip(words(&l1)) {
        let at = header.l1_offset + number * 8;
        if let Some(offset) = check_entry(header, at, value & !entry::COPIED)? {
            tables.push((offset, number * header.l2_entries()));
        }
    }
    // First of all, because a shared table is walked once for each of its entries.
    ensure_distinct(tables.iter().map(|(offset, _)| *offset).collect())?;
    let clusters = header.virtual_size.get().div_ceil(header.cluster_size());
    for (table, first) in &tables {
        if Instant::now() >= deadline {
            return Err(DecodeError::Deadline);
        }
        let wanted = (clusters - first).min(header.l2_entries());
        let entries = read(file, *table, header.cluster_size(), "an L2 table ends")?;
        let size = (header.cluster_size() / header.l2_entries()) as usize;
        for (number, entry) in (0..wanted).zip(entries.chunks_exact(size)) {
            let at = table + number * size as u64;
            let left = header.virtual_size.get() - (first + number) * header.cluster_size();
            data.extend(cluster(header, entry, at, left, length)?);
        }
        if data.len() > CLUSTER_LIMIT {
            return Err(DecodeError::TooManyClusters);
        }
    }
    let size = Bytes(data.len() as u64 * header.cluster_size());
    data.extend(tables.into_iter().map(|(offset, _)| offset));
    ensure_distinct(data)?;
    Ok(size)
}

/// The offset of the data that the L2 entry at `at` names, if any. `left` bytes of the disk follow
/// its first byte.
fn cluster(
    header: &Header,
    entry: &[u8],
    at: u64,
    left: u64,
    length: u64,
) -> Result<Option<u64>, DecodeError> {
    let mut words = words(entry);
    let value = words.next().unwrap_or(0);
    if value & entry::COMPRESSED != 0 {
        let (offset, _) = compressed(header, value);
        let outside = DecodeError::Damaged { what: "a compressed cluster ends", at: offset };
        return if offset < length { Ok(Some(offset)) } else { Err(outside) };
    }
    let has_data = match words.next() {
        // A bit for each subcluster with data, then one for each that reads as zeros.
        Some(bitmap) if bitmap as u32 & (bitmap >> 32) as u32 != 0 => {
            return Err(DecodeError::Damaged { what: "a subcluster with data and without", at });
        }
        Some(bitmap) => bitmap as u32 != 0,
        None => header.version < 3 || value & entry::ZERO == 0,
    };
    if !has_data {
        return Ok(None);
    }
    let Some(offset) = check_entry(header, at, value & !entry::COPIED)? else { return Ok(None) };
    let end = offset.saturating_add(left.min(header.cluster_size()));
    let outside = DecodeError::Damaged { what: "a cluster ends", at: offset };
    if end <= length { Ok(Some(offset)) } else { Err(outside) }
}

fn ensure_distinct(mut offsets: Vec<u64>) -> Result<(), DecodeError> {
    offsets.sort_unstable();
    let shared = offsets.windows(2).find(|pair| pair[0] == pair[1]);
    shared.map_or(Ok(()), |pair| Err(DecodeError::Shared(pair[0])))
}

fn read(file: &File, offset: u64, size: u64, end: &'static str) -> Result<Vec<u8>, DecodeError> {
    let mut bytes = vec![0; size as usize];
    file.read_exact_at(&mut bytes, offset).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => DecodeError::Damaged { what: end, at: offset },
        _ => DecodeError::Read(error),
    })?;
    Ok(bytes)
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let word = |chunk: &[u8]| u64::from_be_bytes(chunk.try_into().expect("chunks of eight bytes"));
    bytes.chunks_exact(8).map(word)
}
