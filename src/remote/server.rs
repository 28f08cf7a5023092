//! The host's end of the protocol: the connection to one caller.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::protocol::{self, Answer, ClientRequest, Greeting, ImagePart, ServerMessage};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::image::import::{ImageSource, ImportError, InvalidImage};
use crate::rpc::response::Response;
use crate::rpc::response_writer::{Delivery, ResponseSink};
use crate::units::Bytes;

/// Time a caller has to send its whole request. It sends it as soon as it has the greeting.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Time a caller has to send the next bytes of an image, or the digest after it.
const IMAGE_PART_TIMEOUT: Duration = Duration::from_secs(60);

/// Time a caller has to report the delivery of an answer. It only passes the answer on before.
const ACKNOWLEDGE_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes that are read at once.
const BUFFER: usize = 256 << 10;

/// The connection to the caller.
#[derive(Clone)]
pub struct Caller {
    input: Arc<Mutex<Input>>,
    output: Arc<Mutex<File>>,
}

/// The bytes from the caller: lines, and an image between two of them.
struct Input {
    reader: BufReader<TimedFile>,
    /// Bytes of the image that are not read yet.
    image_left: u64,
    /// Whether the digest after the image is not read yet.
    digest_left: bool,
    /// How often the image was requested. A reader of an earlier transfer reads nothing more.
    transfer: u32,
}

/// A pipe or a socket that is read until a deadline. A caller that sends nothing would otherwise
/// keep this process, and with it one of the connections of the socket unit.
struct TimedFile {
    file: File,
    deadline: Instant,
}

impl Read for TimedFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let remaining = self.deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(remaining).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) if Instant::now() >= self.deadline => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return self.file.read(buffer),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Caller {
    /// Greets a caller that writes to `input` and reads `output`.
    ///
    /// # Errors
    /// If the caller has closed the connection.
    pub fn greet(input: File, output: File) -> io::Result<Self> {
        let input = TimedFile { file: input, deadline: Instant::now() };
        let reader = BufReader::with_capacity(BUFFER, input);
        let input = Input { reader, image_left: 0, digest_left: false, transfer: 0 };
        let caller =
            Self { input: Arc::new(Mutex::new(input)), output: Arc::new(Mutex::new(output)) };
        caller.send(&ServerMessage::Greeting(Greeting::of_this_version()))?;
        Ok(caller)
    }

    /// Receives the caller's request, waiting at most `timeout` for all of it.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`]; [`ErrorKind::BadRequest`] for a request that this version does not
    /// know, and for one with more than [`protocol::MAX_OBJECTS`] objects.
    pub fn receive_request(&self, timeout: Duration) -> Result<ClientRequest> {
        let request: ClientRequest = self.receive(Instant::now() + timeout).map_err(|error| {
            if error.kind() == io::ErrorKind::TimedOut {
                let seconds = timeout.as_secs();
                let message = format!("the caller sent no whole request within {seconds} seconds");
                return Error::new(ErrorKind::Timeout, message);
            }
            let message =
                "cannot read the request: the caller may have another version of this program";
            Error::new(ErrorKind::BadRequest, message).because(error)
        })?;
        match request.object_count() {
            0..=protocol::MAX_OBJECTS => Ok(request),
            count => {
                let max = protocol::MAX_OBJECTS;
                let message = format!("the request names {count} objects, more than {max}");
                Err(Error::new(ErrorKind::BadRequest, message))
            }
        }
    }

    /// Returns a writer to the caller's log.
    pub fn log(&self) -> CallerLog {
        CallerLog(self.clone())
    }

    /// Returns the caller's image of `size` bytes, which is the file `name` on its machine.
    pub fn image(&self, name: String, size: Bytes) -> CallerImage {
        CallerImage { caller: self.clone(), name, size }
    }

    /// Sends `message`.
    ///
    /// # Errors
    /// If the caller has closed the connection.
    pub fn send(&self, message: &impl Serialize) -> io::Result<()> {
        protocol::send(&mut *lock(&self.output), message)
    }

    fn receive<T: DeserializeOwned>(&self, deadline: Instant) -> io::Result<T> {
        lock(&self.input).receive(deadline)
    }
}

/// Locks `mutex`, also after a panic: a line is written with one call, so a panic leaves no half
/// line.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ResponseSink for Caller {
    fn deliver(&self, response: &Response, await_receipt: bool) -> Delivery {
        let answer = Answer {
            text: String::from_utf8_lossy(response.as_bytes()).into_owned(),
            waits: await_receipt,
            lacks_room: response.lacks_room(),
            crowded: response.is_crowded(),
        };
        if let Err(error) = self.send(&ServerMessage::Answer(answer)) {
            return Delivery::Lost(error);
        }
        if !await_receipt {
            return Delivery::Received;
        }
        match self.receive(Instant::now() + ACKNOWLEDGE_TIMEOUT) {
            Ok(true) => Delivery::Received,
            Ok(false) => Delivery::Lost(io::ErrorKind::BrokenPipe.into()),
            Err(error) => Delivery::Unknown(error),
        }
    }
}

/// A writer of log lines to the caller's log.
pub struct CallerLog(Caller);

impl Write for CallerLog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line.strip_suffix(b"\n").unwrap_or(line)).into_owned();
        self.0.send(&ServerMessage::Log(text))?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A stemcell image on the caller's machine.
pub struct CallerImage {
    caller: Caller,
    name: String,
    size: Bytes,
}

impl CallerImage {
    fn failed(&self, error: io::Error) -> Error {
        Error::os(format!("get '{}' from the caller", self.name), error)
    }
}

impl ImageSource for CallerImage {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn size(&self) -> Option<Bytes> {
        Some(self.size)
    }

    fn allocated_size(&self, _: Instant) -> Result<Bytes> {
        Ok(self.size)
    }

    fn digest(&self, deadline: Instant) -> Result<Digest> {
        self.caller
            .send(&ServerMessage::Want(ImagePart::Digest))
            .and_then(|()| self.caller.receive(deadline))
            .map_err(|error| self.failed(error))
    }

    fn open(&self) -> Result<Box<dyn Read + Send>, ImportError> {
        if self.size == Bytes(0) {
            return Err(InvalidImage::Empty.into());
        }
        let mut input = lock(&self.caller.input);
        let requested = input
            .skip_image()
            .and_then(|()| self.caller.send(&ServerMessage::Want(ImagePart::Image)))
            .map_err(|error| ImportError::from(self.failed(error)));
        requested?;
        input.transfer += 1;
        (input.image_left, input.digest_left) = (self.size.get(), true);
        let transfer = input.transfer;
        Ok(Box::new(ImageReader { input: Arc::clone(&self.caller.input), transfer }))
    }

    fn verify_digest(&self, read: &Digest) -> Result<()> {
        let sent =
            lock(&self.caller.input).read_image_digest().map_err(|error| self.failed(error))?;
        if sent == *read {
            return Ok(());
        }
        let message =
            format!("'{}' was damaged in transfer: its SHA-256 is {read}, not {sent}", self.name);
        Err(Error::new(ErrorKind::Host, message)
            .hint("repeat the call; if it fails again, check the network between the machines"))
    }
}

impl Input {
    fn receive<T: DeserializeOwned>(&mut self, deadline: Instant) -> io::Result<T> {
        self.reader.get_mut().deadline = deadline;
        protocol::receive(&mut self.reader, protocol::MAX_CLIENT_LINE)
    }

    /// Returns the bytes of an image that have arrived, after waiting for the first of them.
    fn image_bytes(&mut self) -> io::Result<&[u8]> {
        self.reader.get_mut().deadline = Instant::now() + IMAGE_PART_TIMEOUT;
        self.reader.fill_buf()
    }

    /// Skips the rest of an image that was not read to its end, and its digest.
    fn skip_image(&mut self) -> io::Result<()> {
        while self.image_left > 0 {
            let available = self.image_bytes()?.len();
            self.consume(available)?;
        }
        if self.digest_left { self.read_image_digest().map(|_| ()) } else { Ok(()) }
    }

    /// Reads the digest that follows an image.
    fn read_image_digest(&mut self) -> io::Result<Digest> {
        self.digest_left = false;
        self.receive(Instant::now() + IMAGE_PART_TIMEOUT)
    }

    /// Consumes at most `count` bytes of the image, and returns how many.
    fn consume(&mut self, count: usize) -> io::Result<usize> {
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let count = count.min(usize::try_from(self.image_left).unwrap_or(usize::MAX));
        self.reader.consume(count);
        self.image_left -= count as u64;
        Ok(count)
    }
}

/// A reader of one transfer of the image.
struct ImageReader {
    input: Arc<Mutex<Input>>,
    transfer: u32,
}

impl Read for ImageReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut input = lock(&self.input);
        if input.transfer != self.transfer || input.image_left == 0 || buffer.is_empty() {
            return Ok(0);
        }
        let left = usize::try_from(input.image_left).unwrap_or(usize::MAX);
        let available = input.image_bytes()?;
        let count = available.len().min(buffer.len()).min(left);
        buffer[..count].copy_from_slice(&available[..count]);
        input.consume(count)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn receive_request_of_an_idle_caller_ends_at_the_timeout() {
        for sent in ["", "{\"find\":["] {
            let (mut caller, host) = UnixStream::pair().unwrap();
            let host = File::from(OwnedFd::from(host));
            let greeted = Caller::greet(host.try_clone().unwrap(), host).unwrap();
            caller.write_all(sent.as_bytes()).unwrap();
            let error = greeted.receive_request(Duration::from_millis(20)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
            assert!(error.report().contains("no whole request within"), "{error}");
        }
    }

    #[test]
    fn image_bytes_past_the_deadline_are_read_and_their_lack_is_an_error() {
        let (mut caller, host) = UnixStream::pair().unwrap();
        let mut input = TimedFile { file: OwnedFd::from(host).into(), deadline: Instant::now() };
        caller.write_all(b"x").unwrap();
        let mut byte = [0];
        assert_eq!(input.read(&mut byte).unwrap(), 1, "the byte is there already");
        assert_eq!(input.read(&mut byte).unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(caller);
        assert_eq!(input.read(&mut byte).unwrap(), 0);
    }
}
