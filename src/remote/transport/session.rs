//! One session with a host: the host greets, then answers one request. A deadline closes it.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::super::protocol::{self, ClientRequest, Greeting, PROGRAM, ServerMessage};
use super::channel::{Channel, Endpoints};
use super::ssh::{self, Sharing};
use super::unix;
use crate::config::{Transport, TransportKind};
use crate::digest::Hasher;
use crate::error::{Error, ErrorKind, Result};
use crate::schema::printable;

/// Time a host has to send its greeting. The request is sent only after it, so a host that does
/// not greet has not begun anything.
const GREETING_TIMEOUT: Duration = Duration::from_secs(20);

/// Bytes of an image that are sent at once.
const CHUNK: usize = 256 << 10;

/// An open session, after the host's greeting.
pub struct Session {
    reader: BufReader<Box<dyn Read + Send>>,
    writer: Box<dyn Write + Send>,
    channel: ClosedOnDrop,
    watchdog: Watchdog,
    /// The host's greeting; `None` until it has arrived.
    greeting: Option<Greeting>,
}

/// A channel that is closed with its session: a host that keeps its end open would otherwise keep
/// an ssh process here.
struct ClosedOnDrop(Arc<dyn Channel>);

impl Drop for ClosedOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Session {
    /// Opens a session by `transport` and waits for the host's greeting. No request is sent before
    /// it, so the call may try another connection. `deadline` closes the session.
    ///
    /// # Errors
    /// [`ErrorKind::Host`] or [`ErrorKind::Timeout`] with the reason.
    pub fn open(transport: &Transport, deadline: Instant) -> Result<Self> {
        let greeting_deadline = || deadline.min(Instant::now() + GREETING_TIMEOUT);
        match transport.kind {
            TransportKind::Ssh => {
                let endpoints = ssh::open(transport, Sharing::Allowed, greeting_deadline())?;
                let channel = Arc::clone(&endpoints.channel);
                let greeted = Self::greeted(endpoints, greeting_deadline(), deadline);
                if greeted.is_ok() || !channel.has_lost_shared_connection() {
                    return greeted;
                }
                // The shared connection was broken, and ssh had not noticed yet.
                let endpoints = ssh::open(transport, Sharing::None, greeting_deadline())?;
                Self::greeted(endpoints, greeting_deadline(), deadline)
            }
            TransportKind::Unix => {
                let endpoints = unix::open(&transport.socket, greeting_deadline())?;
                Self::greeted(endpoints, greeting_deadline(), deadline)
            }
            TransportKind::Local => {
                Err(Error::new(ErrorKind::Internal, "a local host has no session"))
            }
        }
    }

    /// Waits for the greeting on `endpoints`.
    fn greeted(
        endpoints: Endpoints,
        greeting_deadline: Instant,
        deadline: Instant,
    ) -> Result<Self> {
        let Endpoints { reader, writer, channel } = endpoints;
        let watchdog = Watchdog::new(Arc::clone(&channel), greeting_deadline);
        let mut session = Self {
            reader: BufReader::new(reader),
            writer,
            channel: ClosedOnDrop(channel),
            watchdog,
            greeting: None,
        };
        match session.receive() {
            Ok(ServerMessage::Greeting(greeting)) if greeting.program == PROGRAM => {
                session.channel.0.established();
                session.watchdog = Watchdog::new(Arc::clone(&session.channel.0), deadline);
                session.greeting = Some(greeting);
                Ok(session)
            }
            Ok(_) => Err(session.failure(io::ErrorKind::InvalidData.into(), "connect")),
            Err(error) => Err(session.failure(error, "connect")),
        }
    }

    /// Checks that the host's version understands `request`.
    ///
    /// # Errors
    /// [`ErrorKind::NotSupported`]: an older version would ignore a condition of the request.
    pub fn ensure_supports(&self, request: &ClientRequest) -> Result<()> {
        match &self.greeting {
            Some(greeting) if greeting.protocol < request.required_protocol() => {
                let version = printable(&greeting.version);
                let message =
                    format!("its version {version} of {PROGRAM} is too old for this call");
                Err(Error::new(ErrorKind::NotSupported, message)
                    .hint("update the program there: hosts first, then callers"))
            }
            _ => Ok(()),
        }
    }

    /// Receives the host's next message.
    ///
    /// # Errors
    /// As [`protocol::receive`].
    pub fn receive(&mut self) -> io::Result<ServerMessage> {
        protocol::receive(&mut self.reader, protocol::MAX_SERVER_LINE)
    }

    /// Sends `message`.
    ///
    /// # Errors
    /// If the host has closed the session.
    pub fn send(&mut self, message: &impl Serialize) -> io::Result<()> {
        protocol::send(&mut self.writer, message)
    }

    /// Sends the first `size` bytes of `image`, then their SHA-256.
    ///
    /// # Errors
    /// If the host has closed the session, or the file is shorter than `size`.
    pub fn send_image(&mut self, image: File, size: u64) -> io::Result<()> {
        let (mut image, mut hasher, mut remaining) = (image.take(size), Hasher::default(), size);
        let mut chunk = vec![0; CHUNK];
        while remaining > 0 {
            let count = image.read(&mut chunk)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            hasher.update(&chunk[..count]);
            self.writer.write_all(&chunk[..count])?;
            remaining -= count as u64;
        }
        self.send(&hasher.finish())
    }

    /// Returns the error for an `action` that failed because of `error`, with the deadline's or the
    /// channel's reason if there is one.
    pub fn failure(&self, error: io::Error, action: &str) -> Error {
        if self.watchdog.has_fired() {
            let message = format!("{action}: the host did not answer by the deadline");
            return Error::new(ErrorKind::Timeout, message).hint(
                "check the host's load and its log; the host finishes or undoes the request itself",
            );
        }
        let kind = ErrorKind::Host;
        match (self.channel.0.failure(), &self.greeting) {
            (Some(failure), _) => failure.into_error(action),
            (None, _) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Error::new(kind, format!("{action}: the host closed the connection"))
            }
            (None, Some(greeting)) if error.kind() == io::ErrorKind::InvalidData => {
                let version = printable(&greeting.version);
                let message =
                    format!("{action}: its version {version} of {PROGRAM} sent an unknown message");
                Error::new(kind, message).hint("install the same version on both machines")
            }
            (None, None) if error.kind() == io::ErrorKind::InvalidData => {
                let message = format!("{action}: the program that answers there is not {PROGRAM}");
                Error::new(kind, message).hint(
                    "install the program there, and remove output from the user's shell startup \
                     files",
                )
            }
            (None, _) => Error::os(action, error),
        }
    }

    /// Waits until the host has read the last message and closed its end, at most `timeout`.
    pub fn close(self, timeout: Duration) {
        let Self { mut reader, writer, channel, watchdog, .. } = self;
        drop(writer);
        drop(watchdog);
        let _watchdog = Watchdog::new(Arc::clone(&channel.0), Instant::now() + timeout);
        // The end of the stream and an error both end the wait.
        let _ = io::copy(&mut reader, &mut io::sink());
    }
}

/// Closes a channel at its deadline, unless it is dropped before.
struct Watchdog {
    fired: Arc<AtomicBool>,
    _alive: Sender<()>,
}

impl Watchdog {
    fn new(channel_to_close: Arc<dyn Channel>, deadline: Instant) -> Self {
        let (alive, dropped) = channel::<()>();
        let fired = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&fired);
        std::thread::spawn(move || {
            let remaining = deadline.saturating_duration_since(Instant::now());
            if dropped.recv_timeout(remaining) == Err(RecvTimeoutError::Timeout) {
                flag.store(true, Ordering::SeqCst);
                channel_to_close.close();
            }
        });
        Self { fired, _alive: alive }
    }

    fn has_fired(&self) -> bool {
        self.fired.load(Ordering::SeqCst)
    }
}
