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

use super::link::Link;
use super::wire::{Answer, CallQuestion, Question, Want, Word};
use crate::cid::DiskCid;
use crate::config::{HostEntry, Transport, TransportKind};
use crate::cpi::capacity::report::{HostQuery, HostReport};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::log;
use crate::rpc::response_writer::Delivery;
use crate::schema::plain;
use crate::units::Bytes;

/// How long a host may take to hear that an answer was taken.
const HEARS: Duration = Duration::from_secs(5);

/// The most that is shown of what a host says is wrong, in characters.
const LONGEST_REPORT: usize = 8 << 10;

/// A host that is asked.
#[derive(Debug, Clone)]
pub struct Host {
    /// What messages call it.
    pub name: String,
    /// How it is reached.
    pub transport: Transport,
}

/// What a host answered to a call.
pub struct Told {
    /// JSON.
    pub text: String,
    /// Whether the call failed because the host has not the memory or the space.
    pub lacks_room: bool,
    /// Whether it failed because others were faster to put VMs on the host.
    pub crowded: bool,
    /// The link, if the host waits to hear that the answer was taken.
    waiting: Option<Link>,
}

/// Why there is no answer.
#[derive(Debug)]
pub struct Untold {
    /// What is wrong.
    pub error: Error,
    /// Whether the host may have been asked.
    pub asked: bool,
}

impl Host {
    /// One of several.
    pub fn of(entry: &HostEntry) -> Self {
        Self { name: entry.name.to_string(), transport: entry.transport.clone() }
    }

    /// The only host, which has no name in the configuration.
    pub fn only(transport: Transport) -> Self {
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
        call: CallQuestion,
        image: Option<&Image>,
        deadline: Instant,
    ) -> Result<Option<Told>, Untold> {
        let (link, word) = self.ask(&Question::Call(call), image, deadline)?;
        match word {
            Word::Answer(Answer { text, waits, lacks_room, crowded }) => {
                Ok(Some(Told { text, lacks_room, crowded, waiting: waits.then_some(link) }))
            }
            Word::Absent => Ok(None),
            _ => Err(self.senseless(&link)),
        }
    }

    /// What the host has to offer.
    ///
    /// # Errors
    /// As [`Host::call`].
    pub fn offer(&self, wish: &HostQuery, deadline: Instant) -> Result<HostReport, Untold> {
        match self.ask(&Question::Offer(wish.clone()), None, deadline)? {
            (_, Word::Offer(offer)) => Ok(*offer),
            // It could not look.
            (_, Word::Answer(Answer { text, .. })) => Err(self.untold(true, message_of(&text))),
            (link, _) => Err(self.senseless(&link)),
        }
    }

    /// Which of `cids` are on the host.
    ///
    /// # Errors
    /// As [`Host::call`].
    pub fn find(&self, cids: &[String], deadline: Instant) -> Result<Vec<String>, Untold> {
        match self.ask(&Question::Find(cids.to_vec()), None, deadline)? {
            (_, Word::Found(found)) => Ok(found),
            (_, Word::Answer(Answer { text, .. })) => Err(self.untold(true, message_of(&text))),
            (link, _) => Err(self.senseless(&link)),
        }
    }

    /// Has the host give up a disk in a shared pool, so that another can have it.
    ///
    /// # Errors
    /// As [`Host::call`], and why it does not.
    pub fn give_up(&self, disk: &DiskCid, deadline: Instant) -> Result<(), Untold> {
        match self.ask(&Question::GiveUp(disk.clone()), None, deadline)? {
            (_, Word::GivenUp) => Ok(()),
            (_, Word::Answer(Answer { text, .. })) => Err(self.untold(true, message_of(&text))),
            (link, _) => Err(self.senseless(&link)),
        }
    }

    fn ask(
        &self,
        question: &Question,
        image: Option<&Image>,
        deadline: Instant,
    ) -> Result<(Link, Word), Untold> {
        let mut link =
            Link::open(&self.transport, deadline).map_err(|error| self.untold(false, error))?;
        link.fits(question).map_err(|error| self.untold(false, error))?;
        match converse(&mut link, question, image) {
            Ok(word) => Ok((link, word)),
            Err(Lost::Link(error)) => Err(self.untold(true, link.broken(error, "be answered"))),
            Err(Lost::Image(error)) => Err(self.untold(true, error)),
        }
    }

    fn untold(&self, asked: bool, error: Error) -> Untold {
        Untold { error: error.during(format!("host '{}'", self.name)), asked }
    }

    fn senseless(&self, link: &Link) -> Untold {
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
    Link(io::Error),
    Image(Error),
}

/// Serves what the host wants until it says its last word.
fn converse(link: &mut Link, question: &Question, image: Option<&Image>) -> Result<Word, Lost> {
    // A host that has answered listens no more: what can not be said may be too late.
    let mut unsaid = link.say(question).err();
    loop {
        match (link.hear(), image) {
            (Ok(Word::Log(line)), _) => log::relay(&line),
            (
                Ok(
                    last @ (Word::Answer(_)
                    | Word::Absent
                    | Word::Offer(_)
                    | Word::Found(_)
                    | Word::GivenUp),
                ),
                _,
            ) => {
                return Ok(last);
            }
            (Ok(Word::Want(Want::Digest)), Some(image)) => {
                let digest = image.digest().map_err(Lost::Image)?;
                unsaid = link.say(&digest).err().or(unsaid);
            }
            (Ok(Word::Want(Want::Image)), Some(image)) => {
                let file = image.open().map_err(Lost::Image)?;
                unsaid = link.send(file, image.size.get()).err().or(unsaid);
            }
            (Ok(Word::Want(_) | Word::Greeting(_)), _) => {
                return Err(Lost::Link(io::ErrorKind::InvalidData.into()));
            }
            (Err(silence), _) => return Err(Lost::Link(unsaid.unwrap_or(silence))),
        }
    }
}

impl Told {
    /// Whether the host waits to hear that the answer was taken.
    pub fn is_waited_on(&self) -> bool {
        self.waiting.is_some()
    }

    /// Tells the host what became of the answer.
    pub fn tell(self, delivery: &Delivery) {
        let Some(mut link) = self.waiting else { return };
        // If that does not arrive either, the host takes the answer for one of which nobody can tell.
        let said = match delivery {
            Delivery::Received => link.say(&true),
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
