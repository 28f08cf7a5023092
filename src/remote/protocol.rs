//! What a caller and a host say to each other: lines of JSON, and an image's bytes between two of them.
//!
//! ```text
//!   caller                                             host: one process for one question
//!     │                      {"greeting":{…}}            │  nothing was asked yet
//!     │  {"call":{"request":"…",…}}                      │
//!     │                      {"log":"…"}                 │  any number of times: a line of its log
//!     │                      {"want":"digest"}           │  create_stemcell only, and only if it may have the image
//!     │  "<SHA-256>"                                     │
//!     │                      {"want":"image"}            │  once or twice, if it has not
//!     │  <the image>"<SHA-256 of what was sent>"         │
//!     │                      {"answer":{"text":"…",…}}   │
//!     │  true                                            │  if it asks: the answer was taken; false: nobody took it
//! ```
//!
//! A request and an answer are text in text, so that they pass to the letter. Both ends are programs of this project, though
//! not always of one version: keys that a side does not know are left out of account.

use std::io::{self, BufRead, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::cid::DiskCid;
use crate::cpi::offer::{Offer, Wish};
use crate::units::Bytes;

/// What the host says first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// Always [`PROGRAM`]: whoever else answers does not know what is said here.
    pub program: String,
    /// The host's version of it.
    pub version: String,
    /// What it understands; 0: it says nothing of that.
    #[serde(default)]
    pub protocol: u32,
}

/// What this version understands. 1: a question whose conditions an older one would not know of, and so not keep to.
pub const PROTOCOL: u32 = 1;

/// The program on the other end.
pub const PROGRAM: &str = env!("CARGO_PKG_NAME");

impl Greeting {
    /// Of this program.
    pub fn ours() -> Self {
        Self {
            program: PROGRAM.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: PROTOCOL,
        }
    }
}

/// What a caller asks, one question for each connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClientRequest {
    /// To carry out a call of the CPI contract.
    Call(CallRequest),
    /// What the host has to offer.
    #[serde(rename = "offer")]
    Report(Wish),
    /// Which of these cids are on the host.
    Find(Vec<String>),
    /// To give up a disk in a shared pool, which nothing on the host uses, so that another can have it.
    #[serde(rename = "give_up")]
    ReleaseDisk(DiskCid),
}

impl ClientRequest {
    /// What a host must understand to be asked this. Keys that are no condition, only make something better, need nothing.
    pub fn needs(&self) -> u32 {
        match self {
            Self::Call(call) => u32::from(!call.only_with.is_empty() || call.replicated),
            Self::ReleaseDisk(_) => 1,
            Self::Report(_) | Self::Find(_) => 0,
        }
    }

    /// How many things it names.
    pub fn things(&self) -> usize {
        match self {
            Self::Call(call) => call.only_with.len(),
            Self::Report(wish) => wish.cids.len() + wish.addresses.len(),
            Self::Find(cids) => cids.len(),
            Self::ReleaseDisk(_) => 1,
        }
    }
}

/// A call to be carried out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallRequest {
    /// The request, as the Director or bosh-cli wrote it but for its context.
    pub request: String,
    /// The cid of what is created. The caller chooses it, so that it can ask for its removal when no answer comes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cid: Option<String>,
    /// Cids that must be on this host; if one is not, nothing is done.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub only_with: Vec<String>,
    /// How many VMs that had better not be with the new one the host may have, having said so when it was chosen.
    #[serde(rename = "alike", default, skip_serializing_if = "Option::is_none")]
    pub same_group: Option<usize>,
    /// Whether other hosts are asked to make the same under the same cid.
    #[serde(rename = "everywhere", default, skip_serializing_if = "std::ops::Not::not")]
    pub replicated: bool,
    /// Whether it undoes a create of the cid in it, which may not have begun yet: then it must not begin any more.
    #[serde(rename = "undoes", default, skip_serializing_if = "std::ops::Not::not")]
    pub cancels: bool,
    /// The size of the image that create_stemcell is to import.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Bytes>,
}

/// What a host says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerMessage {
    /// First of all.
    Greeting(Greeting),
    /// A line of its log, for the caller's.
    Log(String),
    /// It can not go on without something.
    Want(Want),
    /// Last of all.
    Answer(Answer),
    /// In its place: what the question is about is not here.
    Absent,
    /// In its place, if that was asked.
    #[serde(rename = "offer")]
    Report(Box<Offer>),
    /// In its place: those that are here.
    Found(Vec<String>),
    /// In its place: the disk is nobody's now.
    #[serde(rename = "given_up")]
    DiskReleased,
}

/// What a host can want.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Want {
    /// The SHA-256 of the image, because it has one of the same size.
    Digest,
    /// The image.
    Image,
}

/// The answer to a question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// JSON.
    pub text: String,
    /// Whether it waits to hear that the answer was taken.
    #[serde(default)]
    pub waits: bool,
    /// Whether the call failed because the host has not the memory or the space.
    #[serde(default)]
    pub lacks_room: bool,
    /// Whether it failed because more VMs are there than the question allows.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub crowded: bool,
}

/// The longest question: a request's [`MAX_BYTES`](crate::rpc::request::MAX_BYTES), escaped.
pub const LONGEST_QUESTION: u64 = 64 << 20;

/// The longest word of a host: an [answer's](crate::rpc::response::MAX_FORWARDED) text, escaped.
pub const LONGEST_WORD: u64 = 4 << 20;

/// The most things that one question names.
pub const MAX_THINGS: usize = 1000;

/// Says `what`, on one line.
///
/// # Errors
/// Those of `to`.
pub fn say(to: &mut impl Write, what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(what).map_err(io::Error::other)?;
    line.push(b'\n');
    to.write_all(&line)?;
    to.flush()
}

/// Hears one line, of `longest` bytes at most.
///
/// # Errors
/// [`io::ErrorKind::UnexpectedEof`] when the other side is gone, [`io::ErrorKind::InvalidData`] for what is no such line.
pub fn hear<T: DeserializeOwned>(from: &mut impl BufRead, longest: u64) -> io::Result<T> {
    let mut line = Vec::new();
    from.by_ref().take(longest).read_until(b'\n', &mut line)?;
    if line.pop() != Some(b'\n') {
        let ended = line.len() as u64 + 1 < longest;
        return Err(
            if ended { io::ErrorKind::UnexpectedEof } else { io::ErrorKind::InvalidData }.into()
        );
    }
    // The error would quote what it is about.
    serde_json::from_slice(&line).map_err(|_| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(word: &impl Serialize) -> String {
        let mut bytes = Vec::new();
        say(&mut bytes, word).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn the_words_are_as_drawn() {
        let call = CallRequest { request: "{\n}".into(), ..CallRequest::default() };
        assert_eq!(line(&ClientRequest::Call(call)), "{\"call\":{\"request\":\"{\\n}\"}}\n");
        assert_eq!(line(&ServerMessage::Want(Want::Digest)), "{\"want\":\"digest\"}\n");
        let answer = Answer { text: "{}".into(), waits: true, lacks_room: false, crowded: false };
        assert_eq!(
            line(&ServerMessage::Answer(answer)),
            "{\"answer\":{\"text\":\"{}\",\"waits\":true,\"lacks_room\":false}}\n"
        );
    }

    #[test]
    fn a_line_that_is_cut_off_or_nonsense_is_none() {
        let mut lines = &b"{\"log\":\"x\",\"new\":1}\n{\"log\":\"y\"}\nnonsense\n{\"log\":"[..];
        assert_eq!(
            hear::<ServerMessage>(&mut lines, 1000).unwrap_err().kind(),
            io::ErrorKind::InvalidData,
            "two words in one"
        );
        assert_eq!(
            hear::<ServerMessage>(&mut lines, 1000).unwrap(),
            ServerMessage::Log("y".into())
        );
        assert_eq!(
            hear::<ServerMessage>(&mut lines, 1000).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        assert_eq!(
            hear::<ServerMessage>(&mut lines, 1000).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn a_line_that_is_too_long_is_none() {
        let mut lines = &b"{\"log\":\"0123456789\"}\n"[..];
        assert_eq!(
            hear::<ServerMessage>(&mut lines, 10).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    }

    #[test]
    fn only_a_condition_needs_a_host_that_knows_of_it() {
        let call = |change: fn(&mut CallRequest)| {
            let mut call = CallRequest {
                cid: Some("vm-1".into()),
                same_group: Some(1),
                cancels: true,
                ..CallRequest::default()
            };
            change(&mut call);
            ClientRequest::Call(call).needs()
        };
        assert_eq!(call(|_| {}), 0);
        assert_eq!(
            (
                call(|call| call.only_with = vec!["vm-1".into()]),
                call(|call| call.replicated = true)
            ),
            (1, 1)
        );
    }

    #[test]
    fn keys_of_a_newer_version_are_no_obstacle() {
        let mut lines =
            &b"{\"greeting\":{\"program\":\"p\",\"version\":\"9\",\"moon\":\"full\"}}\n"[..];
        assert!(matches!(
            hear(&mut lines, 1000).unwrap(),
            ServerMessage::Greeting(Greeting { protocol: 0, .. })
        ));
    }
}
