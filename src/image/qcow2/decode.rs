//! Decodes a stream of a qcow2 file into a sparse raw file.
//!
//! `qemu-img convert` writes a file front to back: header, L1 table, and each L2 table before the
//! data it maps, or a few clusters behind that. So one pass is enough:
//!
//! ```text
//!  stream ──▶ [ window: the last 8 to 16 MiB ]        queue: items to read, by offset in the file
//!                     │                                  ▲        │
//!                     │◀─────────── next offset ─────────│────────┘
//!                     ├─ L2 table: its clusters ─────────┘
//!                     └─ cluster: inflate, write at its offset on the disk
//! ```
//!
//! A valid file with another layout, or with features this decoder lacks (such as zstd), ends in
//! [`DecodeError::NotStreamable`]. The window and [`QUEUE_LIMIT`] bound the memory.
//!
//! A table or cluster that two entries name is refused: a few kilobytes of such entries would
//! decode to terabytes. Only internal snapshots share clusters, and these are not read.

#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};
use std::io::{self, Read};
use std::time::Instant;

use flate2::{Decompress, FlushDecompress};

use super::{Compression, Header};
use crate::error::Error;

/// Bytes kept behind the furthest read, at least. The largest cluster fits, and so do packed writes
/// that precede their L2 table.
const MIN_LOOKBACK: usize = 8 << 20;
/// Most tables and clusters in the queue, of 24 bytes each.
const QUEUE_LIMIT: usize = 1 << 20;

/// Why a stream was not decoded.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The file cannot be decoded in one pass; `qemu-img` can convert it.
    #[error("{0}")]
    NotStreamable(&'static str),
    /// The file's tables or clusters are invalid.
    #[error("{what} at byte {at:#x} of the qcow2 file")]
    Damaged {
        /// What is invalid.
        what: &'static str,
        /// Offset in the file.
        at: u64,
    },
    /// Two entries name the same table or cluster.
    #[error("two entries name byte {0:#x} of the qcow2 file")]
    Shared(u64),
    /// The tables map more clusters than this program checks.
    #[error("more than 16 million clusters")]
    TooManyClusters,
    /// The deadline passed.
    #[error("the deadline passed")]
    Deadline,
    /// The stream failed.
    #[error(transparent)]
    Read(io::Error),
    /// The raw image could not be written.
    #[error(transparent)]
    Write(Error),
}

/// Writes data at an offset of the raw image, which has a hole there.
pub type Write<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<(), Error>;

/// Decodes `stream`, a whole qcow2 file with the header `header`, and passes its data to `write`.
/// `header` must name no backing file, no data file and no encryption.
pub fn decode(
    header: &Header,
    stream: impl Read,
    write: Write<'_>,
    deadline: Instant,
) -> Result<(), DecodeError> {
    if header.compression == Compression::Zstd {
        return Err(DecodeError::NotStreamable("its clusters are compressed with zstd"));
    }
    if header.extended_l2 {
        return Err(DecodeError::NotStreamable("it has extended L2 entries"));
    }
    let mut decoder = Decoder {
        header,
        write,
        named: HashSet::new(),
        named_from: 0,
        window: Window::new(stream),
        queue: BinaryHeap::new(),
        inflate: Decompress::new(false),
        cluster: vec![0; header.cluster_size() as usize],
    };
    decoder.read_l1()?;
    while let Some(Reverse(item)) = decoder.queue.pop() {
        if Instant::now() >= deadline {
            return Err(DecodeError::Deadline);
        }
        decoder.ensure_not_named(item.offset)?;
        match item.kind {
            Kind::L2Table => decoder.read_l2(&item)?,
            Kind::Plain => decoder.copy(&item)?,
            Kind::Compressed { length } => decoder.inflate(&item, length)?,
        }
    }
    Ok(())
}

/// A table or cluster to read. The queue returns items by offset.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Item {
    /// Offset in the file of its first byte.
    offset: u64,
    kind: Kind,
    /// The first cluster of the disk that it holds or maps.
    cluster: u64,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    L2Table,
    Plain,
    Compressed { length: u32 },
}

/// Bits of L1 and L2 entries.
pub(super) mod entry {
    pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    pub const COPIED: u64 = 1 << 63;
    pub const COMPRESSED: u64 = 1 << 62;
    pub const ZERO: u64 = 1;
}

struct Decoder<'a, R> {
    header: &'a Header,
    write: Write<'a>,
    /// Offsets of the items that were read and still lie in the window. An item before the window
    /// ends the decoding anyway.
    named: HashSet<u64>,
    /// Start of the window when `named` was last cleared of earlier items.
    named_from: u64,
    window: Window<R>,
    queue: BinaryHeap<Reverse<Item>>,
    inflate: Decompress,
    /// One cluster of the disk.
    cluster: Vec<u8>,
}

impl<R: Read> Decoder<'_, R> {
    fn read_l1(&mut self) -> Result<(), DecodeError> {
        const PIECE: u64 = 64 * 1024;
        let end = self.header.l1_offset.saturating_add(self.header.l1_entries_needed() * 8);
        let mut offset = self.header.l1_offset;
        while offset < end {
            let piece = PIECE.min(end - offset);
            let entries = entries(self.window.range(offset, piece, "the L1 table ends")?);
            for (number, value) in entries.into_iter().enumerate() {
                let at = offset + number as u64 * 8;
                let cluster = (at - self.header.l1_offset) / 8 * self.header.l2_entries();
                self.enqueue_entry(at, value & !entry::COPIED, Kind::L2Table, cluster)?;
            }
            offset += piece;
        }
        Ok(())
    }

    fn read_l2(&mut self, table: &Item) -> Result<(), DecodeError> {
        let clusters = self.header.virtual_size.get().div_ceil(self.header.cluster_size());
        let entries = entries(self.window.range(
            table.offset,
            self.header.cluster_size(),
            "an L2 table ends",
        )?);
        // Entries past the end of the disk have no meaning.
        let wanted = clusters.saturating_sub(table.cluster).min(entries.len() as u64);
        for (number, value) in (0..wanted).zip(entries) {
            let (at, cluster) = (table.offset + number * 8, table.cluster + number);
            if value & entry::COMPRESSED != 0 {
                let (offset, length) = compressed(self.header, value);
                self.push(Item { offset, kind: Kind::Compressed { length }, cluster })?;
            } else if self.header.version >= 3 && value & entry::ZERO != 0 {
                // The cluster reads as zeros, even if the entry has an offset: that is only
                // preallocated space.
            } else {
                self.enqueue_entry(at, value & !entry::COPIED, Kind::Plain, cluster)?;
            }
        }
        Ok(())
    }

    /// Queues the table or cluster that the entry at `at` refers to, if any.
    fn enqueue_entry(
        &mut self,
        at: u64,
        value: u64,
        kind: Kind,
        cluster: u64,
    ) -> Result<(), DecodeError> {
        let named = check_entry(self.header, at, value)?;
        named.map_or(Ok(()), |offset| self.push(Item { offset, kind, cluster }))
    }

    fn push(&mut self, item: Item) -> Result<(), DecodeError> {
        if self.queue.len() >= QUEUE_LIMIT {
            return Err(DecodeError::NotStreamable("its tables lie too far before its data"));
        }
        self.queue.push(Reverse(item));
        Ok(())
    }

    /// Fails if an earlier item lies at `offset`, too.
    fn ensure_not_named(&mut self, offset: u64) -> Result<(), DecodeError> {
        let start = self.window.start;
        if start > self.named_from {
            self.named_from = start;
            self.named.retain(|offset| *offset >= start);
        }
        if self.named.insert(offset) { Ok(()) } else { Err(DecodeError::Shared(offset)) }
    }

    /// Length in bytes of the part of the item's cluster that lies within the disk.
    fn wanted(&self, item: &Item) -> usize {
        let offset = item.cluster * self.header.cluster_size();
        (self.header.virtual_size.get() - offset).min(self.header.cluster_size()) as usize
    }

    fn copy(&mut self, item: &Item) -> Result<(), DecodeError> {
        let wanted = self.wanted(item);
        let data = self.window.range(item.offset, wanted as u64, "a cluster ends")?;
        let offset = item.cluster * self.header.cluster_size();
        (self.write)(offset, data).map_err(DecodeError::Write)
    }

    fn inflate(&mut self, item: &Item, length: u32) -> Result<(), DecodeError> {
        let damaged = DecodeError::Damaged {
            what: "a compressed cluster that cannot be inflated",
            at: item.offset,
        };
        // The file may end within the last cluster's last sector; the decompressor detects missing
        // data.
        let data = self.window.up_to(item.offset, length.into())?;
        self.inflate.reset(false);
        let result = self.inflate.decompress(data, &mut self.cluster, FlushDecompress::Finish);
        if result.is_err() || self.inflate.total_out() != self.cluster.len() as u64 {
            return Err(damaged);
        }
        let (wanted, offset) = (self.wanted(item), item.cluster * self.header.cluster_size());
        (self.write)(offset, &self.cluster[..wanted]).map_err(DecodeError::Write)
    }
}

/// The offset that the entry `value` at `at` names, if any: of an L1 entry or of a plain L2 entry.
pub(super) fn check_entry(
    header: &Header,
    at: u64,
    value: u64,
) -> Result<Option<u64>, DecodeError> {
    if value & !entry::OFFSET != 0 {
        return Err(DecodeError::Damaged { what: "an entry with reserved bits set", at });
    }
    if !value.is_multiple_of(header.cluster_size()) {
        return Err(DecodeError::Damaged { what: "an entry that names no cluster", at });
    }
    Ok((value != 0).then_some(value))
}

/// Offset and greatest length of a compressed cluster. The entry counts the length in sectors,
/// starting with the sector that contains the offset.
pub(super) fn compressed(header: &Header, value: u64) -> (u64, u32) {
    let offset_bits = 62 - (header.cluster_bits - 8);
    let offset = value & ((1 << offset_bits) - 1);
    let sectors = ((value & !entry::COPIED & !entry::COMPRESSED) >> offset_bits) + 1;
    // At most 2^13 + 1 sectors: cluster_bits is at most 21.
    (offset, (sectors * 512 - offset % 512) as u32)
}

fn entries(table: &[u8]) -> Vec<u64> {
    table
        .chunks_exact(8)
        .map(|entry| u64::from_be_bytes(entry.try_into().expect("chunks of eight bytes")))
        .collect()
}

/// A window on the bytes of a stream that were read last.
struct Window<R> {
    stream: R,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that are filled.
    filled: usize,
    /// Offset in the stream of the first of them.
    start: u64,
}

impl<R: Read> Window<R> {
    fn new(stream: R) -> Self {
        Self { stream, buffer: vec![0; 2 * MIN_LOOKBACK], filled: 0, start: 0 }
    }

    /// The `length` bytes at `offset`. `end` describes the error if the stream ends before.
    fn range(&mut self, offset: u64, length: u64, end: &'static str) -> Result<&[u8], DecodeError> {
        let bytes = self.up_to(offset, length)?;
        if bytes.len() as u64 == length {
            Ok(bytes)
        } else {
            Err(DecodeError::Damaged { what: end, at: offset })
        }
    }

    /// The `length` bytes at `offset`, fewer where the stream ends. `length` is at most
    /// [`MIN_LOOKBACK`].
    fn up_to(&mut self, offset: u64, length: u64) -> Result<&[u8], DecodeError> {
        if offset < self.start {
            return Err(DecodeError::NotStreamable("its tables lie behind its data"));
        }
        let end = offset.saturating_add(length);
        while self.start + (self.filled as u64) < end {
            if self.filled == self.buffer.len() {
                self.buffer.copy_within(MIN_LOOKBACK.., 0);
                self.start += (self.buffer.len() - MIN_LOOKBACK) as u64;
                self.filled = MIN_LOOKBACK;
            }
            match self.stream.read(&mut self.buffer[self.filled..]) {
                Ok(0) => break,
                Ok(count) => self.filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(DecodeError::Read(error)),
            }
        }
        let index = |at: u64| (at.saturating_sub(self.start) as usize).min(self.filled);
        Ok(&self.buffer[index(offset)..index(end)])
    }
}
