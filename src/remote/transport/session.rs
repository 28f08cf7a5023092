//! A way to a host, for one question: two ends that can be cut at the deadline.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::super::protocol::{self, ClientRequest, Greeting, PROGRAM, ServerMessage};
use super::{ssh, unix};
use crate::config::{Transport, TransportKind};
use crate::digest::Hasher;
use crate::error::{Error, ErrorKind, Result};
use crate::schema::printable;

/// How long a host may take to greet. Nothing has been asked of it then.
const GREETS: Duration = Duration::from_secs(20);

/// Bytes of an image sent at once.
const CHUNK: usize = 256 << 10;

/// An open way.
pub struct Session {
    reader: BufReader<Box<dyn Read + Send>>,
    writer: Box<dyn Write + Send>,
    /// What carries the bytes.
    below: Cut,
    watch: Watch,
    /// What the host said of itself.
    greeting: Option<Greeting>,
}

/// What carries the bytes of a way that ends when this goes: a host that keeps its end open would have a process here for it.
struct Cut(Arc<dyn Below>);

impl Drop for Cut {
    fn drop(&mut self) {
        self.0.cut();
    }
}

/// What carries the bytes of a [`Session`].
pub(super) trait Below: Send + Sync {
    /// Ends it: whoever reads or writes fails.
    fn cut(&self);

    /// Why it broke, in words of its own, once it has.
    fn why(&self) -> Option<Broken>;

    /// Whether it broke as a connection does that was made long ago, so that a new one may do better.
    fn is_worn(&self) -> bool {
        false
    }
}

/// Which connection a session is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Connection {
    /// One that other calls use, too.
    Shared,
    /// One of its own.
    Own,
}

/// What is wrong with a way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Broken {
    pub cause: String,
    pub hint: Option<&'static str>,
}

impl Broken {
    /// As the failure to do something.
    pub fn into_error(self, doing: &str) -> Error {
        let error = Error::new(ErrorKind::Host, format!("{doing}: {}", self.cause));
        match self.hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}

/// The two ends of an open way, and what is below.
pub(super) struct Ends {
    pub reader: Box<dyn Read + Send>,
    pub writer: Box<dyn Write + Send>,
    pub below: Arc<dyn Below>,
}

impl Session {
    /// Opens a way by `transport` and hears the host's greeting: nothing was asked before.
    ///
    /// # Errors
    /// [`ErrorKind::Host`] or [`ErrorKind::Timeout`] saying why there is none.
    pub fn open(transport: &Transport, deadline: Instant) -> Result<Self> {
        let greets = || deadline.min(Instant::now() + GREETS);
        match transport.kind {
            TransportKind::Ssh => {
                let shared = ssh::open(transport, Connection::Shared, greets())?;
                let below = Arc::clone(&shared.below);
                let greeted = Self::greeted(shared, greets(), deadline);
                if greeted.is_ok() || !below.is_worn() {
                    return greeted;
                }
                // The connection that calls share may have died unnoticed.
                Self::greeted(ssh::open(transport, Connection::Own, greets())?, greets(), deadline)
            }
            TransportKind::Unix => {
                Self::greeted(unix::open(&transport.socket, greets())?, greets(), deadline)
            }
            TransportKind::Local => {
                Err(Error::new(ErrorKind::Internal, "a local host is not called through a link"))
            }
        }
    }

    /// The way with these ends, once the host has greeted.
    fn greeted(ends: Ends, greets: Instant, deadline: Instant) -> Result<Self> {
        let Ends { reader, writer, below } = ends;
        let watch = Watch::new(Arc::clone(&below), greets);
        let mut link = Self {
            reader: BufReader::new(reader),
            writer,
            below: Cut(below),
            watch,
            greeting: None,
        };
        match link.hear() {
            Ok(ServerMessage::Greeting(greeting)) if greeting.program == PROGRAM => {
                link.watch = Watch::new(Arc::clone(&link.below.0), deadline);
                link.greeting = Some(greeting);
                Ok(link)
            }
            Ok(_) => Err(link.broken(io::ErrorKind::InvalidData.into(), "be greeted")),
            Err(error) => Err(link.broken(error, "be greeted")),
        }
    }

    /// Whether the host understands what `question` needs.
    ///
    /// # Errors
    /// [`ErrorKind::NotSupported`]: it would do something else than is asked.
    pub fn fits(&self, question: &ClientRequest) -> Result<()> {
        match &self.greeting {
            Some(greeting) if greeting.protocol < question.needs() => {
                let message = format!(
                    "its version {} of {PROGRAM} is too old for this call",
                    printable(&greeting.version)
                );
                Err(Error::new(ErrorKind::NotSupported, message)
                    .hint("update the program there: hosts first, then callers"))
            }
            _ => Ok(()),
        }
    }

    /// What the host says next.
    ///
    /// # Errors
    /// As [`protocol::hear`].
    pub fn hear(&mut self) -> io::Result<ServerMessage> {
        protocol::hear(&mut self.reader, protocol::LONGEST_WORD)
    }

    /// Says `what`.
    ///
    /// # Errors
    /// If nobody listens.
    pub fn say(&mut self, what: &impl Serialize) -> io::Result<()> {
        protocol::say(&mut self.writer, what)
    }

    /// Sends the first `size` bytes of `image`, and their digest.
    ///
    /// # Errors
    /// If nobody listens, or the file has not as many.
    pub fn send(&mut self, image: File, size: u64) -> io::Result<()> {
        let (mut image, mut hasher, mut left) = (image.take(size), Hasher::default(), size);
        let mut chunk = vec![0; CHUNK];
        while left > 0 {
            let count = image.read(&mut chunk)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            hasher.update(&chunk[..count]);
            self.writer.write_all(&chunk[..count])?;
            left -= count as u64;
        }
        self.say(&hasher.finish())
    }

    /// The failure to do something, because of `error`: with what is known of the way.
    pub fn broken(&self, error: io::Error, doing: &str) -> Error {
        if self.watch.has_cut() {
            return Error::new(ErrorKind::Timeout, format!("{doing}: the host did not answer by the deadline"))
                .hint("see whether the host is well; what was asked of it is finished or undone there by itself");
        }
        let kind = ErrorKind::Host;
        match self.below.0.why() {
            Some(broken) => broken.into_error(doing),
            None if error.kind() == io::ErrorKind::UnexpectedEof => {
                Error::new(kind, format!("{doing}: the host closed the connection"))
            }
            None if error.kind() == io::ErrorKind::InvalidData && self.greeting.is_some() => {
                let version = self
                    .greeting
                    .as_ref()
                    .map(|greeting| printable(&greeting.version))
                    .unwrap_or_default();
                Error::new(
                    kind,
                    format!("{doing}: what its version {version} of {PROGRAM} says is not understood here"),
                )
                .hint("install the same version on both machines")
            }
            None if error.kind() == io::ErrorKind::InvalidData => {
                Error::new(kind, format!("{doing}: what answers there is not {PROGRAM}"))
                    .hint("install the program there, and see what its users' shells print")
            }
            None => Error::os(doing, error),
        }
    }

    /// Waits until the host has heard the last that was said, at most `patience`.
    pub fn close(self, patience: Duration) {
        let Self { mut reader, writer, below, watch, .. } = self;
        drop(writer);
        drop(watch);
        let _watch = Watch::new(Arc::clone(&below.0), Instant::now() + patience);
        let _ = io::copy(&mut reader, &mut io::sink());
    }
}

/// Cuts a way at its deadline, unless it is dropped before.
struct Watch {
    cut: Arc<AtomicBool>,
    _alive: Sender<()>,
}

impl Watch {
    fn new(below: Arc<dyn Below>, deadline: Instant) -> Self {
        let (alive, gone) = channel::<()>();
        let cut = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&cut);
        std::thread::spawn(move || {
            let left = deadline.saturating_duration_since(Instant::now());
            if gone.recv_timeout(left) == Err(RecvTimeoutError::Timeout) {
                flag.store(true, Ordering::SeqCst);
                below.cut();
            }
        });
        Self { cut, _alive: alive }
    }

    fn has_cut(&self) -> bool {
        self.cut.load(Ordering::SeqCst)
    }
}
