//! The host's end of the wire: what it hears of its caller and says to it.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::protocol::{self, Answer, ClientRequest, Greeting, ServerMessage, Want};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::image::import::{Failure, ImageSource, Refusal};
use crate::patience::within;
use crate::rpc::outlet::{Delivery, Way};
use crate::rpc::response::Response;
use crate::units::Bytes;

/// How long a caller may take to say that it took an answer. It has nothing to do but to pass it on.
const ACKNOWLEDGES: Duration = Duration::from_secs(30);

/// Read at once.
const BUFFER: usize = 256 << 10;

/// Whoever asks.
#[derive(Clone)]
pub struct Caller {
    input: Arc<Mutex<Input>>,
    output: Arc<Mutex<File>>,
}

/// What the caller says, and how much of an image is to come before its next line.
struct Input {
    bytes: BufReader<File>,
    /// Bytes of the image that were not read yet.
    left: u64,
    /// Whether the digest after them was not read yet.
    unsealed: bool,
    /// Counts the times the image was asked for.
    turn: u32,
}

impl Caller {
    /// Greets a caller that is heard on `input` and hears `output`.
    ///
    /// # Errors
    /// If it is gone.
    pub fn greet(input: File, output: File) -> io::Result<Self> {
        let bytes = BufReader::with_capacity(BUFFER, input);
        let input = Input { bytes, left: 0, unsealed: false, turn: 0 };
        let caller =
            Self { input: Arc::new(Mutex::new(input)), output: Arc::new(Mutex::new(output)) };
        caller.send(&ServerMessage::Greeting(Greeting::ours()))?;
        Ok(caller)
    }

    /// What it asks. It may take its time.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`] for what this version does not understand, or for too much.
    pub fn receive_request(&self) -> Result<ClientRequest> {
        let question: ClientRequest = self.hear().map_err(|error| {
            let message =
                "the question can not be read: the caller may have another version of this program";
            Error::new(ErrorKind::BadRequest, message).because(error)
        })?;
        match question.things() {
            0..=protocol::MAX_THINGS => Ok(question),
            many => {
                let message =
                    format!("the question names {many} things, more than {}", protocol::MAX_THINGS);
                Err(Error::new(ErrorKind::BadRequest, message))
            }
        }
    }

    /// Its log.
    pub fn log(&self) -> CallersLog {
        CallersLog(self.clone())
    }

    /// The image that it says it has, of `size`, called `name` where it is.
    pub fn image(&self, name: String, size: Bytes) -> CallersImage {
        CallersImage { caller: self.clone(), name, size }
    }

    /// Says what it is asked for when no call is to be carried out.
    ///
    /// # Errors
    /// If the caller is gone.
    pub fn send(&self, word: &impl Serialize) -> io::Result<()> {
        protocol::say(&mut *lock(&self.output), word)
    }

    fn hear<T: DeserializeOwned>(&self) -> io::Result<T> {
        protocol::hear(&mut lock(&self.input).bytes, protocol::LONGEST_QUESTION)
    }
}

/// Who panicked with it did not leave half a line: lines are written at once.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Way for Caller {
    fn deliver(&self, answer: &Response, matters: bool) -> Delivery {
        let text = String::from_utf8_lossy(answer.as_bytes()).into_owned();
        let answer = Answer {
            text,
            waits: matters,
            lacks_room: answer.lacks_room(),
            crowded: answer.is_crowded(),
        };
        if let Err(error) = self.send(&ServerMessage::Answer(answer)) {
            return Delivery::Lost(error);
        }
        if !matters {
            return Delivery::Taken;
        }
        let caller = self.clone();
        match within(Instant::now() + ACKNOWLEDGES, move || caller.hear::<bool>()) {
            Some(Ok(true)) => Delivery::Taken,
            Some(Ok(false)) => Delivery::Lost(io::ErrorKind::BrokenPipe.into()),
            Some(Err(error)) => Delivery::Unknown(error),
            None => Delivery::Unknown(io::ErrorKind::TimedOut.into()),
        }
    }
}

/// A writer of lines that are written to the caller's log.
pub struct CallersLog(Caller);

impl Write for CallersLog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line.strip_suffix(b"\n").unwrap_or(line)).into_owned();
        self.0.send(&ServerMessage::Log(text))?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An image that is on the caller's machine.
pub struct CallersImage {
    caller: Caller,
    name: String,
    size: Bytes,
}

impl CallersImage {
    fn failed(&self, error: io::Error) -> Error {
        Error::os(format!("get '{}' from the caller", self.name), error)
    }
}

impl ImageSource for CallersImage {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn size(&self) -> Option<Bytes> {
        Some(self.size)
    }

    fn takes(&self, _: Instant) -> Result<Bytes> {
        Ok(self.size)
    }

    fn digest(&self, deadline: Instant) -> Result<Digest> {
        let caller = self.caller.clone();
        let asked = within(deadline, move || {
            caller.send(&ServerMessage::Want(Want::Digest)).and_then(|()| caller.hear())
        });
        asked
            .unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into()))
            .map_err(|error| self.failed(error))
    }

    fn open(&self) -> Result<Box<dyn Read + Send>, Failure> {
        if self.size == Bytes(0) {
            return Err(Refusal::Empty.into());
        }
        let mut input = lock(&self.caller.input);
        let begun = input
            .skip_image()
            .and_then(|()| self.caller.send(&ServerMessage::Want(Want::Image)))
            .map_err(|error| Failure::from(self.failed(error)));
        begun?;
        input.turn += 1;
        (input.left, input.unsealed) = (self.size.get(), true);
        Ok(Box::new(Incoming { input: Arc::clone(&self.caller.input), turn: input.turn }))
    }

    fn vouch(&self, read: &Digest) -> Result<()> {
        let sent = lock(&self.caller.input).seal().map_err(|error| self.failed(error))?;
        if sent == *read {
            return Ok(());
        }
        let message = format!("'{}' did not arrive as it was sent", self.name);
        Err(Error::new(ErrorKind::Host, message)
            .hint("repeat the call; if that helps nothing, look at the link"))
    }
}

impl Input {
    /// Reads past what is left of an image that was not read to its end.
    fn skip_image(&mut self) -> io::Result<()> {
        let left = std::mem::take(&mut self.left);
        let skipped = io::copy(&mut self.bytes.by_ref().take(left), &mut io::sink())?;
        if skipped < left {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if self.unsealed { self.seal().map(|_| ()) } else { Ok(()) }
    }

    /// The digest after an image.
    fn seal(&mut self) -> io::Result<Digest> {
        self.unsealed = false;
        protocol::hear(&mut self.bytes, protocol::LONGEST_QUESTION)
    }
}

/// The bytes of an image as they come.
struct Incoming {
    input: Arc<Mutex<Input>>,
    turn: u32,
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut input = lock(&self.input);
        if input.turn != self.turn || input.left == 0 || buffer.is_empty() {
            return Ok(0);
        }
        let bytes = input.bytes.fill_buf()?;
        let count = bytes.len().min(buffer.len());
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let count = count.min(usize::try_from(input.left).unwrap_or(usize::MAX));
        buffer[..count].copy_from_slice(&input.bytes.buffer()[..count]);
        input.bytes.consume(count);
        input.left -= count as u64;
        Ok(count)
    }
}
