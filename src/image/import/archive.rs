//! The tar archive around the image: finds the image among its members and rejects unsafe members.

use std::cell::Cell;
use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};
use std::time::Instant;

use tar::{Archive, EntryType, Header, PaxExtensions};

use super::ImportError;
use super::invalid_image::{InvalidImage, printable};
use crate::units::Bytes;

/// Names of the image at the archive's top level: `root.img` in openstack and aws stemcells,
/// `disk.raw` in google stemcells.
const IMAGE_NAMES: [&str; 2] = ["root.img", "disk.raw"];
/// Most bytes that the long names, extended headers and hole map of one member may take. The hole
/// map of a badly fragmented 5 GiB image takes less than 1 MiB.
const HEADER_LIMIT: u64 = 4 << 20;
/// Most member names listed in an error.
const NAMES_SHOWN: usize = 5;

/// Whether `block`, the first of a file, is the header of an archive's first member. Its checksum
/// decides.
pub(super) fn is_archive(block: &[u8]) -> bool {
    let Ok(block) = <&[u8; 512]>::try_from(block) else { return false };
    // The checksum counts its own field, bytes 148 to 155, as spaces.
    let byte = |at: usize| if (148..156).contains(&at) { b' ' } else { block[at] };
    let sum: u32 = (0..block.len()).map(|at| u32::from(byte(at))).sum();
    Header::from_byte_slice(block).cksum().is_ok_and(|stored| stored == sum)
}

/// Reads the archive in `stream` to its end. Calls `accept` once, with the image and the size of
/// its file.
pub(super) fn read<T>(
    stream: impl Read,
    deadline: Instant,
    mut accept: impl FnMut(&mut dyn Read, Bytes) -> Result<T, ImportError>,
) -> Result<T, ImportError> {
    let limit = Limit::default();
    let mut archive = Archive::new(Bounded { stream, limit: &limit });
    let mut image = None;
    let mut others = Vec::new();
    let mut entries = archive.entries()?;
    loop {
        limit.left.set(Some(HEADER_LIMIT));
        let Some(entry) = entries.next() else { break };
        let mut entry = entry.map_err(|error| limit.explain(error))?;
        limit.left.set(None);
        let (path, kind) = (entry.path_bytes().into_owned(), entry.header().entry_type());
        let top = check_member(&path, kind)?;
        entry.pax_extensions()?.map_or(Ok(()), ensure_no_posix_sparse)?;
        let size = Bytes(entry.size());
        let mut member = Member { left: size.get(), content: entry, deadline };
        if top.is_some_and(|name| is_file(kind) && IMAGE_NAMES.contains(&name)) {
            if image.is_some() {
                return Err(InvalidImage::TwoImages(printable(&path)).into());
            }
            image = Some(accept(&mut member, size).map_err(|failure| failure.in_member(&path))?);
        } else if others.len() <= NAMES_SHOWN {
            others.push(printable(&path));
        }
        // Every member is read to its end: this reveals a truncated archive, and the next limit
        // then covers the next headers alone.
        io::copy(&mut member, &mut io::sink())
            .map_err(|error| ImportError::from(error).in_member(&path))?;
    }
    if limit.ended.get() {
        return Err(InvalidImage::Truncated("the tar archive").into());
    }
    ensure_padding(archive.into_inner().stream)?;
    image.ok_or_else(|| InvalidImage::NoImage(list_names(others)).into())
}

fn is_file(kind: EntryType) -> bool {
    matches!(kind, EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse)
}

/// Checks path and kind of a member. Returns its name if it lies at the top level.
fn check_member(path: &[u8], kind: EntryType) -> Result<Option<&str>, InvalidImage> {
    let mut parts =
        Path::new(OsStr::from_bytes(path)).components().filter(|part| *part != Component::CurDir);
    if parts.clone().any(|part| !matches!(part, Component::Normal(_))) {
        return Err(InvalidImage::MemberPath(printable(path)));
    }
    let kind = match kind {
        EntryType::Directory | EntryType::XGlobalHeader => None,
        kind if is_file(kind) => None,
        EntryType::Symlink => Some("symbolic link"),
        EntryType::Link => Some("hard link"),
        EntryType::Char | EntryType::Block => Some("device"),
        EntryType::Fifo => Some("pipe"),
        _ => Some("file of unknown type"),
    };
    match (kind, parts.next(), parts.next()) {
        (Some(kind), ..) => Err(InvalidImage::MemberKind { name: printable(path), kind }),
        (None, Some(Component::Normal(name)), None) => Ok(name.to_str()),
        _ => Ok(None),
    }
}

/// Rejects holes in POSIX format: the tar crate would return the member's hole map as the beginning
/// of its data.
fn ensure_no_posix_sparse(mut extensions: PaxExtensions<'_>) -> Result<(), ImportError> {
    if extensions.any(|extension| {
        extension.is_ok_and(|extension| extension.key_bytes().starts_with(b"GNU.sparse"))
    }) {
        return Err(InvalidImage::Archive(
            "it has holes in POSIX format; pack it with tar --format=gnu".into(),
        )
        .into());
    }
    Ok(())
}

fn list_names(mut names: Vec<String>) -> String {
    if names.is_empty() {
        return "no file at all".into();
    }
    if names.len() > NAMES_SHOWN {
        names[NAMES_SHOWN] = "…".into();
    }
    names.join(", ")
}

/// Checks that only zeros follow the archive: tar pads it to a whole tape record.
fn ensure_padding(mut stream: impl Read) -> Result<(), ImportError> {
    let mut buffer = [0; 8192];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            count if buffer[..count].iter().any(|byte| *byte != 0) => {
                return Err(InvalidImage::Trailing.into());
            }
            _ => {}
        }
    }
}

/// State of a [`Bounded`] reader, shared while the archive owns the reader.
#[derive(Default)]
struct Limit {
    /// Bytes that may still be read; `None` means no limit.
    left: Cell<Option<u64>>,
    ended: Cell<bool>,
}

impl Limit {
    /// Converts an error of the tar crate, which has no error kind for an archive that ends early.
    fn explain(&self, error: io::Error) -> ImportError {
        if self.ended.get() {
            InvalidImage::Truncated("the tar archive").into()
        } else {
            error.into()
        }
    }
}

/// Limits what the tar crate reads for names and headers, which it keeps in memory.
struct Bounded<'a, R> {
    stream: R,
    limit: &'a Limit,
}

impl<R: Read> Read for Bounded<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most =
            self.limit.left.get().map_or(buffer.len(), |left| buffer.len().min(left as usize));
        if most == 0 && !buffer.is_empty() {
            return Err(io::Error::other("names and headers of a member take more than 4 MiB"));
        }
        let count = self.stream.read(&mut buffer[..most])?;
        self.limit.left.set(self.limit.left.get().map(|left| left - count as u64));
        self.limit.ended.set(count == 0 && !buffer.is_empty());
        Ok(count)
    }
}

/// The content of a member. Fails with [`io::ErrorKind::UnexpectedEof`] if it is shorter than its
/// header states, and with [`io::ErrorKind::TimedOut`] at the deadline: a hole may have terabytes
/// and reads nothing from the stream.
struct Member<R> {
    content: R,
    left: u64,
    deadline: Instant,
}

impl<R: Read> Read for Member<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if Instant::now() >= self.deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let count = self.content.read(buffer)?;
        if count == 0 && self.left > 0 && !buffer.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left = self.left.saturating_sub(count as u64);
        Ok(count)
    }
}
