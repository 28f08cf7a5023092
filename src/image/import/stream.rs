//! What a stemcell's image comes in, read and gunzipped by a thread of its own.
//!
//! ```text
//!  reader thread: source ─▶ SHA-256 ─▶ gunzip if it is gzip ─▶ chunks ──channel──▶ Stream (io::Read)
//! ```
//!
//! What the reader thread finds wrong is its own result: on the channel the stream only breaks off.

use std::io::{self, BufRead, BufReader, Read};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, channel, sync_channel};
use std::time::{Duration, Instant};

use flate2::bufread::MultiGzDecoder;

use super::invalid_image::InvalidImage;
use super::{ImageSource, ImportError, Progress};
use crate::digest::{Digest, Hasher};
use crate::error::Error;
use crate::units::Bytes;

/// Bytes handed over at once.
const CHUNK: usize = 256 * 1024;
/// Chunks that may wait: 4 MiB, enough to ride out a burst on either side.
const CHANNEL_CAPACITY: usize = 16;
/// How long a reader that nobody listens to any more may take for what it was reading.
const READER_EXIT_TIMEOUT: Duration = Duration::from_secs(1);

/// Some of the source's content.
struct Chunk {
    data: Vec<u8>,
    /// Bytes of the file read so far.
    position: u64,
}

/// Reads what `source` has in a thread and gives its content, gunzipped, to `consume`. Returns what that returned and the
/// digest of the whole, which `consume` must have read to its end.
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
        // Nobody listens to a reader that was given up.
        let _ = done.send(send_content(bytes, &name, &sender));
    });
    let mut stream =
        Stream { receiver, chunk: Vec::new(), consumed_bytes: 0, ended: false, deadline, progress };
    let consumed = consume(&mut stream);
    // A reader that is still sending must notice that nobody listens before it is waited for.
    drop(stream);
    // One that hangs in a read is left behind.
    let timeout = deadline.saturating_duration_since(Instant::now()).max(READER_EXIT_TIMEOUT);
    match (outcome.recv_timeout(timeout), consumed) {
        // Whatever the consumer made of a stream that broke off, this is why.
        (Ok(Err(why)), _) => Err(why),
        (_, Err(why)) => Err(why),
        (Ok(Ok(digest)), Ok(result)) => Ok((result, digest)),
        (Err(RecvTimeoutError::Timeout), Ok(_)) => Err(ImportError::TimedOut),
        (Err(RecvTimeoutError::Disconnected), Ok(_)) => panic!("the reader of an image panicked"),
    }
}

/// Sends the content of `bytes` until it ends or nobody listens.
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

/// What the error of a read means: the source's own are marked, those of the decompressor are not.
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

/// An error of the source itself, on its way through a decompressor.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
struct SourceError(io::Error);

/// A file with or without gzip around its content.
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

/// Bytes that are digested as they are read.
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

/// The consumer's end. Its errors: [`io::ErrorKind::TimedOut`] at the deadline, [`io::ErrorKind::BrokenPipe`] when the
/// reader thread failed and knows why.
pub(super) struct Stream<'a> {
    receiver: Receiver<Option<Chunk>>,
    chunk: Vec<u8>,
    /// Bytes of `chunk` already given out.
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
