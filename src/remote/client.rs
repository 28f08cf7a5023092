//! The client's end of the protocol: sends one request to a host, and reports whether the answer
//! was delivered.
//!
//! ```text
//!   open a session ──► send the request ──► send image parts ──► answer ──► delivered, or lost
//!     │ fails            │ the session breaks, or the deadline passes
//!     ▼                  ▼
//!   nothing was        the host finishes the request, or undoes it
//!   sent
//! ```

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::protocol::{Answer, CallRequest, ClientRequest, ImagePart, ServerMessage};
use super::transport::Session;
use crate::cid::DiskCid;
use crate::config::{HostEntry, Transport, TransportKind};
use crate::cpi::capacity::report::{HostQuery, HostReport};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::log;
use crate::rpc::response_writer::Delivery;
use crate::schema::plain;
use crate::units::Bytes;

/// Time a host has to read the report about the delivery and close the session.
const ACKNOWLEDGE_TIMEOUT: Duration = Duration::from_secs(5);

/// The most characters of a host's error message that the client's own message quotes.
const MAX_ERROR_MESSAGE: usize = 8 << 10;

/// How often a host may want the digest of an image, and its bytes. A host wants the digest once,
/// and the bytes once or twice (see [`super::protocol`]).
const MAX_IMAGE_REQUESTS: u32 = 3;

/// The action that a session's error names after the request was sent.
const WAITING: &str = "wait for the answer";

/// A client of one host.
#[derive(Debug, Clone)]
pub struct Client {
    /// The host's name in messages.
    pub name: String,
    /// How the host is reached.
    pub transport: Transport,
}

/// A host's answer to a call.
pub struct Reply {
    /// The CPI response, as JSON.
    pub text: String,
    /// Whether the call failed because the host lacks memory or disk space.
    pub lacks_room: bool,
    /// Whether the call failed because other calls have put more VMs of the group on the host.
    pub crowded: bool,
    /// The session, if the host waits for the report about the delivery.
    waiting: Option<Session>,
}

/// Why a request has no answer.
#[derive(Debug)]
pub struct CallError {
    /// The cause, with the host's name.
    pub error: Error,
    /// Whether the host may have received the request.
    pub sent: bool,
}

impl Client {
    /// Returns the client of one host of a group.
    pub fn for_entry(entry: &HostEntry) -> Self {
        Self { name: entry.name.to_string(), transport: entry.transport.clone() }
    }

    /// Returns the client of the only host, whose address is its name: the configuration has none.
    pub fn for_single_host(transport: Transport) -> Self {
        let name = match transport.kind {
            TransportKind::Ssh => {
                transport.host.as_ref().map(ToString::to_string).unwrap_or_default()
            }
            TransportKind::Unix => transport.socket.display().to_string(),
            TransportKind::Local => "localhost".to_owned(),
        };
        Self { name, transport }
    }

    /// Has the host execute `call`, with `image` as the image of create_stemcell. Returns `None` if
    /// the host lacks an object of [`CallRequest::only_with`].
    ///
    /// # Errors
    /// [`ErrorKind::Host`] or [`ErrorKind::Timeout`], with the host's name.
    pub fn call(
        &self,
        call: CallRequest,
        image: Option<&StemcellImage>,
        deadline: Instant,
    ) -> Result<Option<Reply>, CallError> {
        match self.request(&ClientRequest::Call(call), image, deadline)? {
            (session, ServerMessage::Answer(answer)) => {
                let Answer { text, waits, lacks_room, crowded } = answer;
                let waiting = waits.then_some(session);
                Ok(Some(Reply { text, lacks_room, crowded, waiting }))
            }
            (_, ServerMessage::Absent) => Ok(None),
            (session, other) => Err(self.unexpected(&session, other)),
        }
    }

    /// Returns the host's capacity, and which objects of `query` it has.
    ///
    /// # Errors
    /// As [`Client::call`], and the host's own error.
    pub fn report(&self, query: &HostQuery, deadline: Instant) -> Result<HostReport, CallError> {
        match self.request(&ClientRequest::Report(query.clone()), None, deadline)? {
            (_, ServerMessage::Report(report)) => Ok(*report),
            (session, other) => Err(self.unexpected(&session, other)),
        }
    }

    /// Returns those of `cids` that the host has.
    ///
    /// # Errors
    /// As [`Client::report`].
    pub fn find(&self, cids: &[String], deadline: Instant) -> Result<Vec<String>, CallError> {
        match self.request(&ClientRequest::Find(cids.to_vec()), None, deadline)? {
            (_, ServerMessage::Found(found)) => Ok(found),
            (session, other) => Err(self.unexpected(&session, other)),
        }
    }

    /// Has the host release ownership of a disk in a shared pool, so that another host can take it.
    ///
    /// # Errors
    /// As [`Client::report`]; the host refuses while it uses the disk.
    pub fn release_disk(&self, disk: &DiskCid, deadline: Instant) -> Result<(), CallError> {
        match self.request(&ClientRequest::ReleaseDisk(disk.clone()), None, deadline)? {
            (_, ServerMessage::DiskReleased) => Ok(()),
            (session, other) => Err(self.unexpected(&session, other)),
        }
    }

    /// Opens a session, sends `request`, and returns the host's last message.
    fn request(
        &self,
        request: &ClientRequest,
        image: Option<&StemcellImage>,
        deadline: Instant,
    ) -> Result<(Session, ServerMessage), CallError> {
        let not_sent = |error| self.error(false, error);
        let mut session = Session::open(&self.transport, deadline).map_err(not_sent)?;
        session.ensure_supports(request).map_err(not_sent)?;
        match exchange(&mut session, request, image) {
            Ok(last) => Ok((session, last)),
            Err(ExchangeError::Session(error)) => {
                Err(self.error(true, session.failure(error, WAITING)))
            }
            Err(ExchangeError::Image(error)) => Err(self.error(true, error)),
        }
    }

    fn error(&self, sent: bool, error: Error) -> CallError {
        CallError { error: error.during(format!("host '{}'", self.name)), sent }
    }

    /// Returns the error for a last message that does not fit the request: an answer holds the
    /// host's own error.
    fn unexpected(&self, session: &Session, message: ServerMessage) -> CallError {
        self.error(
            true,
            match message {
                ServerMessage::Answer(answer) => error_in(&answer.text),
                _ => session.failure(io::ErrorKind::InvalidData.into(), WAITING),
            },
        )
    }
}

/// Returns the error that a CPI response reports.
fn error_in(response: &str) -> Error {
    let response: Value = serde_json::from_str(response).unwrap_or_default();
    let message = response["error"]["message"].as_str().unwrap_or("it sent no CPI response");
    let message: String = message.chars().take(MAX_ERROR_MESSAGE).collect();
    Error::new(ErrorKind::Host, plain(&message))
}

/// Why a session ended without a last message.
enum ExchangeError {
    Session(io::Error),
    Image(Error),
}

/// Sends `request`, then the parts of `image` that the host wants, until the host's last message.
fn exchange(
    session: &mut Session,
    request: &ClientRequest,
    image: Option<&StemcellImage>,
) -> Result<ServerMessage, ExchangeError> {
    // A host that refuses early stops reading and still answers. So a failed write is an error only
    // if no answer follows.
    let mut write_error = session.send(request).err();
    let mut image_requests = 0;
    loop {
        let message = session.receive();
        if matches!(message, Ok(ServerMessage::Want(_))) {
            image_requests += 1;
            if image_requests > MAX_IMAGE_REQUESTS {
                return Err(ExchangeError::Image(endless_image_requests()));
            }
        }
        match (message, image) {
            (Ok(ServerMessage::Log(line)), _) => log::relay(&line),
            (Ok(ServerMessage::Want(ImagePart::Digest)), Some(image)) => {
                let digest = image.digest().map_err(ExchangeError::Image)?;
                write_error = session.send(&digest).err().or(write_error);
            }
            (Ok(ServerMessage::Want(ImagePart::Image)), Some(image)) => {
                let file = image.open().map_err(ExchangeError::Image)?;
                write_error = session.send_image(file, image.size.get()).err().or(write_error);
            }
            (Ok(ServerMessage::Want(_) | ServerMessage::Greeting(_)), _) => {
                return Err(ExchangeError::Session(io::ErrorKind::InvalidData.into()));
            }
            (Ok(last), _) => return Ok(last),
            (Err(error), _) => return Err(ExchangeError::Session(write_error.unwrap_or(error))),
        }
    }
}

fn endless_image_requests() -> Error {
    let message = format!("it asked for the image more than {MAX_IMAGE_REQUESTS} times");
    Error::new(ErrorKind::Host, message).hint("install the same version on both machines")
}

impl Reply {
    /// Returns whether the host waits for the report about the delivery.
    pub fn is_host_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Reports to the host whether the answer was delivered. Without a report the host keeps the
    /// object, and logs which call deletes it.
    pub fn report_delivery(self, delivery: &Delivery) {
        let Some(mut session) = self.waiting else { return };
        let sent = match delivery {
            Delivery::Received => session.send(&true),
            Delivery::Lost(_) => session.send(&false),
            Delivery::Unknown(_) => return,
        };
        match sent {
            Ok(()) => session.close(ACKNOWLEDGE_TIMEOUT),
            Err(error) => {
                tracing::warn!(%error, "cannot report the delivery of the answer to the host");
            }
        }
    }
}

/// The image of a create_stemcell call: a file on the client's machine.
#[derive(Debug, Clone)]
pub struct StemcellImage<'a> {
    path: &'a Path,
    /// Its size, in bytes.
    pub size: Bytes,
}

impl<'a> StemcellImage<'a> {
    /// Returns the file at `path`.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`] if it is not a regular file.
    pub fn new(path: &'a Path) -> Result<Self> {
        let meta = path.metadata().at("read", path)?;
        if !meta.is_file() {
            let message = format!("'{}' is not a regular file", path.display());
            return Err(Error::new(ErrorKind::BadRequest, message));
        }
        Ok(Self { path, size: Bytes(meta.len()) })
    }

    fn open(&self) -> Result<File> {
        File::open(self.path).at("read", self.path)
    }

    fn digest(&self) -> Result<Digest> {
        Digest::of_file(self.path)
    }
}
