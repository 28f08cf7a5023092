//! The caller's end of the wire: asks a host one question, and tells it what became of the answer.
//!
//! ```text
//!   open a link ──► ask ──► serve its wishes ──► answer ──► taken or not
//!     │ broken       │ broken, or no answer by the deadline
//!     ▼              ▼
//!   nothing was     the host finishes what it was asked, or undoes it
//!   asked
//! ```

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::protocol::{Answer, CallRequest, ClientRequest, ServerMessage, Want};
use super::transport::Session;
use crate::cid::DiskCid;
use crate::config::{HostEntry, Transport, TransportKind};
use crate::cpi::offer::{Offer, Wish};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::log;
use crate::rpc::outlet::Delivery;
use crate::schema::plain;
use crate::units::Bytes;

/// How long a host may take to hear that an answer was taken.
const HEARS: Duration = Duration::from_secs(5);

/// The most that is shown of what a host says is wrong, in characters.
const LONGEST_REPORT: usize = 8 << 10;

/// A host that is asked.
#[derive(Debug, Clone)]
pub struct Client {
    /// What messages call it.
    pub name: String,
    /// How it is reached.
    pub transport: Transport,
}

/// What a host answered to a call.
pub struct Reply {
    /// JSON.
    pub text: String,
    /// Whether the call failed because the host has not the memory or the space.
    pub lacks_room: bool,
    /// Whether it failed because others were faster to put VMs on the host.
    pub crowded: bool,
    /// The link, if the host waits to hear that the answer was taken.
    waiting: Option<Session>,
}

/// Why there is no answer.
#[derive(Debug)]
pub struct CallError {
    /// What is wrong.
    pub error: Error,
    /// Whether the host may have been asked.
    pub asked: bool,
}

impl Client {
    /// One of several.
    pub fn for_entry(entry: &HostEntry) -> Self {
        Self { name: entry.name.to_string(), transport: entry.transport.clone() }
    }

    /// The only host, which has no name in the configuration.
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

    /// Has the host carry out `call`, whose image is the file `image` if it has one. `None` if that was asked only of a host
    /// with something that this one has not.
    ///
    /// # Errors
    /// [`ErrorKind::Host`] or [`ErrorKind::Timeout`], naming the host.
    pub fn call(
        &self,
        call: CallRequest,
        image: Option<&Image>,
        deadline: Instant,
    ) -> Result<Option<Reply>, CallError> {
        let (link, word) = self.ask(&ClientRequest::Call(call), image, deadline)?;
        match word {
            ServerMessage::Answer(Answer { text, waits, lacks_room, crowded }) => {
                Ok(Some(Reply { text, lacks_room, crowded, waiting: waits.then_some(link) }))
            }
            ServerMessage::Absent => Ok(None),
            _ => Err(self.senseless(&link)),
        }
    }

    /// What the host has to offer.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn report(&self, wish: &Wish, deadline: Instant) -> Result<Offer, CallError> {
        match self.ask(&ClientRequest::Report(wish.clone()), None, deadline)? {
            (_, ServerMessage::Report(offer)) => Ok(*offer),
            // It could not look.
            (_, ServerMessage::Answer(Answer { text, .. })) => {
                Err(self.untold(true, message_of(&text)))
            }
            (link, _) => Err(self.senseless(&link)),
        }
    }

    /// Which of `cids` are on the host.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn find(&self, cids: &[String], deadline: Instant) -> Result<Vec<String>, CallError> {
        match self.ask(&ClientRequest::Find(cids.to_vec()), None, deadline)? {
            (_, ServerMessage::Found(found)) => Ok(found),
            (_, ServerMessage::Answer(Answer { text, .. })) => {
                Err(self.untold(true, message_of(&text)))
            }
            (link, _) => Err(self.senseless(&link)),
        }
    }

    /// Has the host give up a disk in a shared pool, so that another can have it.
    ///
    /// # Errors
    /// As [`Client::call`], and why it does not.
    pub fn give_up(&self, disk: &DiskCid, deadline: Instant) -> Result<(), CallError> {
        match self.ask(&ClientRequest::ReleaseDisk(disk.clone()), None, deadline)? {
            (_, ServerMessage::DiskReleased) => Ok(()),
            (_, ServerMessage::Answer(Answer { text, .. })) => {
                Err(self.untold(true, message_of(&text)))
            }
            (link, _) => Err(self.senseless(&link)),
        }
    }

    fn ask(
        &self,
        question: &ClientRequest,
        image: Option<&Image>,
        deadline: Instant,
    ) -> Result<(Session, ServerMessage), CallError> {
        let mut link =
            Session::open(&self.transport, deadline).map_err(|error| self.untold(false, error))?;
        link.fits(question).map_err(|error| self.untold(false, error))?;
        match converse(&mut link, question, image) {
            Ok(word) => Ok((link, word)),
            Err(Lost::Session(error)) => Err(self.untold(true, link.broken(error, "be answered"))),
            Err(Lost::Image(error)) => Err(self.untold(true, error)),
        }
    }

    fn untold(&self, asked: bool, error: Error) -> CallError {
        CallError { error: error.during(format!("host '{}'", self.name)), asked }
    }

    fn senseless(&self, link: &Session) -> CallError {
        self.untold(true, link.broken(io::ErrorKind::InvalidData.into(), "be answered"))
    }
}

/// The failure that an answer tells of.
fn message_of(answer: &str) -> Error {
    let answer: Value = serde_json::from_str(answer).unwrap_or_default();
    let message =
        answer["error"]["message"].as_str().unwrap_or("it gave no answer that makes sense");
    // A report of 8 KiB at most, as in an answer.
    Error::new(ErrorKind::Host, plain(&message.chars().take(LONGEST_REPORT).collect::<String>()))
}

/// Why a conversation ended without an answer.
enum Lost {
    Session(io::Error),
    Image(Error),
}

/// Serves what the host wants until it says its last word.
fn converse(
    link: &mut Session,
    question: &ClientRequest,
    image: Option<&Image>,
) -> Result<ServerMessage, Lost> {
    // A host that has answered listens no more: what can not be said may be too late.
    let mut unsaid = link.say(question).err();
    loop {
        match (link.hear(), image) {
            (Ok(ServerMessage::Log(line)), _) => log::relay(&line),
            (
                Ok(
                    last @ (ServerMessage::Answer(_)
                    | ServerMessage::Absent
                    | ServerMessage::Report(_)
                    | ServerMessage::Found(_)
                    | ServerMessage::DiskReleased),
                ),
                _,
            ) => {
                return Ok(last);
            }
            (Ok(ServerMessage::Want(Want::Digest)), Some(image)) => {
                let digest = image.digest().map_err(Lost::Image)?;
                unsaid = link.say(&digest).err().or(unsaid);
            }
            (Ok(ServerMessage::Want(Want::Image)), Some(image)) => {
                let file = image.open().map_err(Lost::Image)?;
                unsaid = link.send(file, image.size.get()).err().or(unsaid);
            }
            (Ok(ServerMessage::Want(_) | ServerMessage::Greeting(_)), _) => {
                return Err(Lost::Session(io::ErrorKind::InvalidData.into()));
            }
            (Err(silence), _) => return Err(Lost::Session(unsaid.unwrap_or(silence))),
        }
    }
}

impl Reply {
    /// Whether the host waits to hear that the answer was taken.
    pub fn is_waited_on(&self) -> bool {
        self.waiting.is_some()
    }

    /// Tells the host what became of the answer.
    pub fn tell(self, delivery: &Delivery) {
        let Some(mut link) = self.waiting else { return };
        // If that does not arrive either, the host takes the answer for one of which nobody can tell.
        let said = match delivery {
            Delivery::Taken => link.say(&true),
            Delivery::Lost(_) => link.say(&false),
            Delivery::Unknown(_) => return,
        };
        match said {
            Ok(()) => link.close(HEARS),
            Err(error) => tracing::warn!(%error, "the host did not hear what became of its answer"),
        }
    }
}

/// The image that create_stemcell is called with.
#[derive(Debug, Clone)]
pub struct Image<'a> {
    path: &'a Path,
    /// Its size.
    pub size: Bytes,
}

impl<'a> Image<'a> {
    /// The file at `path`.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`] if it is none.
    pub fn at(path: &'a Path) -> Result<Self> {
        let meta = path.metadata().at("read", path)?;
        if !meta.is_file() {
            return Err(Error::new(
                ErrorKind::BadRequest,
                format!("'{}' is no file", path.display()),
            ));
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
