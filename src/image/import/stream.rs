//! Reads and decompresses a stemcell's image on its own thread.
//!
//! ```text
//!  reader thread: source ─▶ SHA-256 ─▶ gunzip if gzip ─▶ chunks ──channel──▶ Stream (io::Read)
//! ```
//!
//! The reader thread returns its error as its result; on the channel the stream merely ends.

use std::io::{self, BufRead, BufReader, Read};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, channel, sync_channel};
use std::time::{Duration, Instant};

use flate2::bufread::MultiGzDecoder;

use super::invalid_image::InvalidImage;
use super::{ImageSource, ImportError, Progress};
use crate::digest::{Digest, Hasher};
use crate::error::Error;
use crate::units::Bytes;

/// Bytes in one chunk.
const CHUNK: usize = 256 * 1024;
/// Chunks in the channel: 4 MiB, enough to absorb a burst on either side.
const CHANNEL_CAPACITY: usize = 16;
/// Least time to wait for a reader whose stream was dropped to finish its last read.
const READER_EXIT_TIMEOUT: Duration = Duration::from_secs(1);

/// A piece of the source's content.
struct Chunk {
    data: Vec<u8>,
    /// Bytes of the file read so far.
    position: u64,
}

/// Reads `source` on a thread and passes its content, decompressed, to `consume`. Returns the
/// result of `consume`, which must read to the end, and the digest of the source.
pub(super) fn read<T>(
    source: &dyn ImageSource,
    deadline: Instant,
    progress: Progress<'_>,
    consume: impl FnOnce(&mut Stream<'_>) -> Result<T, ImportError>,
) -> Result<(T, Digest), ImportError> {
    let (sender, receiver) = sync_channel(CHANNEL_CAPACITY);
    let (done, outcome) = channel();
    let (bytes, name) = (source.open()?, source.name());
    std::thread::spawn(move || {
        // The receiver was dropped if the wait below timed out.
        let _ = done.send(send_content(bytes, &name, &sender));
    });
    let mut stream =
        Stream { receiver, chunk: Vec::new(), consumed_bytes: 0, ended: false, deadline, progress };
    let consumed = consume(&mut stream);
    // Dropping the stream ends a reader that is still sending, before the wait for it.
    drop(stream);
    // A reader that hangs in a read is not waited for.
    let timeout = deadline.saturating_duration_since(Instant::now()).max(READER_EXIT_TIMEOUT);
    match (outcome.recv_timeout(timeout), consumed) {
        // The reader's error is the cause of the consumer's.
        (Ok(Err(why)), _) => Err(why),
        (_, Err(why)) => Err(why),
        (Ok(Ok(digest)), Ok(result)) => Ok((result, digest)),
        (Err(RecvTimeoutError::Timeout), Ok(_)) => Err(ImportError::TimedOut),
        (Err(RecvTimeoutError::Disconnected), Ok(_)) => panic!("the reader of an image panicked"),
    }
}

/// Sends the content of `bytes` until it ends or the receiver is dropped.
fn send_content(
    bytes: Box<dyn Read + Send>,
    name: &str,
    sender: &SyncSender<Option<Chunk>>,
) -> Result<Digest, ImportError> {
    let mut file = BufReader::with_capacity(
        CHUNK,
        HashingReader { bytes, hasher: Hasher::default(), position: 0 },
    );
    let gzip =
        file.fill_buf().map_err(|error| source_failure(name, error))?.starts_with(&[0x1f, 0x8b]);
    let mut content = if gzip {
        Content::Gzip(Box::new(MultiGzDecoder::new(file)))
    } else {
        Content::Plain(file)
    };
    loop {
        let mut data = Vec::with_capacity(CHUNK);
        content
            .reader()
            .take(CHUNK as u64)
            .read_to_end(&mut data)
            .map_err(|error| failure(name, error))?;
        let position = content.file().get_ref().position;
        let chunk = (!data.is_empty()).then_some(Chunk { data, position });
        let ended = chunk.is_none();
        if sender.send(chunk).is_err() || ended {
            return Ok(content.into_file().into_inner().hasher.finish());
        }
    }
}

/// Converts the error of a read: [`SourceError`] marks the source's own; all others are the
/// decompressor's.
fn failure(name: &str, error: io::Error) -> ImportError {
    match error.kind() {
        _ if error.get_ref().and_then(|inner| inner.downcast_ref::<SourceError>()).is_some() => {
            source_failure(name, error)
        }
        io::ErrorKind::UnexpectedEof => InvalidImage::Truncated("the gzip data").into(),
        _ => InvalidImage::Gzip(error.to_string()).into(),
    }
}

fn source_failure(name: &str, error: io::Error) -> ImportError {
    let error = match error.downcast::<SourceError>() {
        Ok(SourceError(error)) | Err(error) => error,
    };
    Error::os(format!("read '{name}'"), error).into()
}

/// An error of the source itself, passing through a decompressor.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
struct SourceError(io::Error);

/// The content of a file, gzipped or not.
enum Content {
    Gzip(Box<MultiGzDecoder<BufReader<HashingReader>>>),
    Plain(BufReader<HashingReader>),
}

impl Content {
    fn reader(&mut self) -> &mut dyn Read {
        match self {
            Self::Gzip(content) => content,
            Self::Plain(content) => content,
        }
    }

    fn file(&self) -> &BufReader<HashingReader> {
        match self {
            Self::Gzip(content) => content.get_ref(),
            Self::Plain(content) => content,
        }
    }

    fn into_file(self) -> BufReader<HashingReader> {
        match self {
            Self::Gzip(content) => content.into_inner(),
            Self::Plain(content) => content,
        }
    }
}

/// Reads bytes and computes their digest.
struct HashingReader {
    bytes: Box<dyn Read + Send>,
    hasher: Hasher,
    position: u64,
}

impl Read for HashingReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let interrupted = |error: &io::Error| error.kind() == io::ErrorKind::Interrupted;
        let count = self.bytes.read(buffer).map_err(|error| {
            if interrupted(&error) { error } else { io::Error::other(SourceError(error)) }
        })?;
        self.hasher.update(&buffer[..count]);
        self.position += count as u64;
        Ok(count)
    }
}

/// The consumer's end. Fails with [`io::ErrorKind::TimedOut`] at the deadline, and with
/// [`io::ErrorKind::BrokenPipe`] if the reader thread failed; the thread returns the cause.
pub(super) struct Stream<'a> {
    receiver: Receiver<Option<Chunk>>,
    chunk: Vec<u8>,
    /// Bytes of `chunk` already consumed.
    consumed_bytes: usize,
    ended: bool,
    deadline: Instant,
    progress: Progress<'a>,
}

impl Stream<'_> {
    fn next_chunk(&mut self) -> io::Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match self.receiver.recv_timeout(left) {
            Ok(Some(chunk)) => {
                (self.progress)(Bytes(chunk.position));
                (self.chunk, self.consumed_bytes) = (chunk.data, 0);
            }
            Ok(None) => self.ended = true,
            Err(RecvTimeoutError::Timeout) => return Err(io::ErrorKind::TimedOut.into()),
            Err(RecvTimeoutError::Disconnected) => return Err(io::ErrorKind::BrokenPipe.into()),
        }
        Ok(())
    }
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.consumed_bytes == self.chunk.len() && !self.ended {
            self.next_chunk()?;
        }
        let count = buffer.len().min(self.chunk.len() - self.consumed_bytes);
        buffer[..count]
            .copy_from_slice(&self.chunk[self.consumed_bytes..self.consumed_bytes + count]);
        self.consumed_bytes += count;
        Ok(count)
    }
}
