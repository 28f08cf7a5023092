//! The file a stemcell's image comes in, read and gunzipped by a thread of its own.
//!
//! ```text
//!  reader thread: file ─▶ SHA-256 ─▶ gunzip if it is gzip ─▶ chunks ──channel──▶ Stream (io::Read)
//! ```
//!
//! What the reader thread finds wrong is its own result: on the channel the stream only breaks off.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, channel, sync_channel};
use std::time::{Duration, Instant};

use flate2::bufread::MultiGzDecoder;

use super::refusal::Refusal;
use super::{Failure, Progress};
use crate::error::{Error, IoContext};
use crate::image::digest::{Digest, Hasher};
use crate::units::Bytes;

/// Bytes handed over at once.
const CHUNK: usize = 256 * 1024;
/// Chunks that may wait: 4 MiB, enough to ride out a burst on either side.
const WAITING: usize = 16;
/// How long a reader that nobody listens to any more may take for what it was reading.
const LAST_READ: Duration = Duration::from_secs(1);

/// Some of the source's content.
struct Chunk {
    data: Vec<u8>,
    /// Bytes of the file read so far.
    position: u64,
}

/// Opens the file at `path`, which must be a regular file that is not empty.
pub(super) fn open(path: &Path) -> Result<File, Failure> {
    // Looked at before it is opened: opening a pipe would wait for its writer.
    let meta = path.metadata().at("read", path)?;
    if !meta.is_file() {
        return Err(Refusal::NoFile.into());
    }
    if meta.len() == 0 {
        return Err(Refusal::Empty.into());
    }
    Ok(File::open(path).at("read", path)?)
}

/// Reads `file` in a thread and gives its content, gunzipped, to `consume`. Returns what that returned and the digest
/// of the whole file, which `consume` must have read to its end.
pub(super) fn read<T>(
    file: File,
    path: &Path,
    deadline: Instant,
    progress: Progress<'_>,
    consume: impl FnOnce(&mut Stream<'_>) -> Result<T, Failure>,
) -> Result<(T, Digest), Failure> {
    let (sender, receiver) = sync_channel(WAITING);
    let (done, outcome) = channel();
    let name = path.to_owned();
    std::thread::spawn(move || {
        // Nobody listens to a reader that was given up.
        let _ = done.send(pump(file, &name, &sender));
    });
    let mut stream = Stream { receiver, chunk: Vec::new(), taken: 0, ended: false, deadline, progress };
    let consumed = consume(&mut stream);
    // A reader that is still sending must notice that nobody listens before it is waited for.
    drop(stream);
    // One that hangs in a read is left behind.
    let patience = deadline.saturating_duration_since(Instant::now()).max(LAST_READ);
    match (outcome.recv_timeout(patience), consumed) {
        // Whatever the consumer made of a stream that broke off, this is why.
        (Ok(Err(why)), _) => Err(why),
        (_, Err(why)) => Err(why),
        (Ok(Ok(digest)), Ok(result)) => Ok((result, digest)),
        (Err(RecvTimeoutError::Timeout), Ok(_)) => Err(Failure::TimedOut),
        (Err(RecvTimeoutError::Disconnected), Ok(_)) => panic!("the reader of an image panicked"),
    }
}

/// Sends the content of `file` until it ends or nobody listens.
fn pump(file: File, path: &Path, sender: &SyncSender<Option<Chunk>>) -> Result<Digest, Failure> {
    let mut file = BufReader::with_capacity(CHUNK, Hashed { file, hasher: Hasher::default(), position: 0 });
    let gzip = file.fill_buf().at("read", path)?.starts_with(&[0x1f, 0x8b]);
    let mut content = if gzip { Content::Gzip(Box::new(MultiGzDecoder::new(file))) } else { Content::Plain(file) };
    loop {
        let mut data = Vec::with_capacity(CHUNK);
        content.reader().take(CHUNK as u64).read_to_end(&mut data).map_err(|error| failure(path, error))?;
        let position = content.file().get_ref().position;
        let chunk = (!data.is_empty()).then_some(Chunk { data, position });
        let ended = chunk.is_none();
        if sender.send(chunk).is_err() || ended {
            return Ok(content.into_file().into_inner().hasher.finish());
        }
    }
}

/// What the error of a read means: the system's have a number, those of the decompressor have none.
fn failure(path: &Path, error: io::Error) -> Failure {
    match error.kind() {
        _ if error.raw_os_error().is_some() => Error::io("read", path, error).into(),
        io::ErrorKind::UnexpectedEof => Refusal::Truncated("the gzip data").into(),
        _ => Refusal::Gzip(error.to_string()).into(),
    }
}

/// A file with or without gzip around its content.
enum Content {
    Gzip(Box<MultiGzDecoder<BufReader<Hashed>>>),
    Plain(BufReader<Hashed>),
}

impl Content {
    fn reader(&mut self) -> &mut dyn Read {
        match self {
            Self::Gzip(content) => content,
            Self::Plain(content) => content,
        }
    }

    fn file(&self) -> &BufReader<Hashed> {
        match self {
            Self::Gzip(content) => content.get_ref(),
            Self::Plain(content) => content,
        }
    }

    fn into_file(self) -> BufReader<Hashed> {
        match self {
            Self::Gzip(content) => content.into_inner(),
            Self::Plain(content) => content,
        }
    }
}

/// A file that digests what is read of it.
struct Hashed {
    file: File,
    hasher: Hasher,
    position: u64,
}

impl Read for Hashed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
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
    taken: usize,
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
                (self.chunk, self.taken) = (chunk.data, 0);
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
        if self.taken == self.chunk.len() && !self.ended {
            self.next_chunk()?;
        }
        let count = buffer.len().min(self.chunk.len() - self.taken);
        buffer[..count].copy_from_slice(&self.chunk[self.taken..self.taken + count]);
        self.taken += count;
        Ok(count)
    }
}
