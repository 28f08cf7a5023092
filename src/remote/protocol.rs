//! The protocol between a client and a host: lines of JSON, and an image's bytes between two lines.
//!
//! ```text
//!   client                                             host: one process for each request
//!     │                      {"greeting":{…}}            │  before the request
//!     │  {"call":{"request":"…",…}}                      │
//!     │                      {"log":"…"}                 │  any number: a line of the host's log
//!     │                      {"want":"digest"}           │  create_stemcell: it may have the image
//!     │  "<SHA-256>"                                     │
//!     │                      {"want":"image"}            │  once or twice, if the host lacks it
//!     │  <the image>"<SHA-256 of the bytes sent>"        │
//!     │                      {"answer":{"text":"…",…}}   │
//!     │  true                                            │  if it waits: delivered; false: lost
//! ```
//!
//! A CPI request and its response are JSON strings inside the JSON, so they arrive byte for byte.
//! Both ends are this program, but versions may differ: each side ignores keys it does not know.

use std::io::{self, BufRead, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::cid::DiskCid;
use crate::cpi::capacity::report::{HostQuery, HostReport};
use crate::units::Bytes;

/// The host's first message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// [`PROGRAM`]. A client sends no request to another program.
    pub program: String,
    /// The host's version of the program.
    pub version: String,
    /// The host's [`PROTOCOL`]; 0 from versions that send none.
    #[serde(default)]
    pub protocol: u32,
}

/// The protocol level of this version. Level 1 adds conditions that level 0 would ignore:
/// `only_with`, `everywhere`, `give_up`.
pub const PROTOCOL: u32 = 1;

/// The name of the program on both ends.
pub const PROGRAM: &str = env!("CARGO_PKG_NAME");

impl Greeting {
    /// Returns the greeting of this version.
    pub fn of_this_version() -> Self {
        Self {
            program: PROGRAM.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: PROTOCOL,
        }
    }
}

/// The one request of a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClientRequest {
    /// Execute a call of the CPI contract.
    Call(CallRequest),
    /// Report the host's capacity.
    #[serde(rename = "offer")]
    Report(HostQuery),
    /// Return those of the cids that the host has.
    Find(Vec<String>),
    /// Release ownership of a disk in a shared pool, so that another host can take it. The host
    /// refuses while it uses the disk.
    #[serde(rename = "give_up")]
    ReleaseDisk(DiskCid),
}

impl ClientRequest {
    /// Returns the [`PROTOCOL`] level the host must have. Only keys that an older host must not
    /// ignore need one.
    pub fn required_protocol(&self) -> u32 {
        match self {
            Self::Call(call) => u32::from(!call.only_with.is_empty() || call.replicated),
            Self::ReleaseDisk(_) => 1,
            Self::Report(_) | Self::Find(_) => 0,
        }
    }

    /// Returns how many objects the request names; at most [`MAX_OBJECTS`] are accepted.
    pub fn object_count(&self) -> usize {
        match self {
            Self::Call(call) => call.only_with.len(),
            Self::Report(query) => query.cids.len() + query.addresses.len(),
            Self::Find(cids) => cids.len(),
            Self::ReleaseDisk(_) => 1,
        }
    }
}

/// A CPI call for the host to execute.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallRequest {
    /// The CPI request as the Director or bosh-cli wrote it, with a changed context.
    pub request: String,
    /// The cid of the object to create. The client chooses it, so it can have the object deleted if
    /// no answer arrives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cid: Option<String>,
    /// Cids that the host must have. If one is missing, the host does nothing and answers
    /// [`ServerMessage::Absent`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub only_with: Vec<String>,
    /// The most VMs of the new VM's group that the host may have: the number it reported when the
    /// scheduler chose it.
    #[serde(rename = "alike", default, skip_serializing_if = "Option::is_none")]
    pub same_group: Option<usize>,
    /// Whether other hosts create the same object under the same cid.
    #[serde(rename = "everywhere", default, skip_serializing_if = "std::ops::Not::not")]
    pub replicated: bool,
    /// Whether the call cancels the create of the cid it names. A create that has not begun then
    /// never begins.
    #[serde(rename = "undoes", default, skip_serializing_if = "std::ops::Not::not")]
    pub cancels: bool,
    /// The size of the image that create_stemcell imports, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Bytes>,
}

/// A message from the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerMessage {
    /// The first message.
    Greeting(Greeting),
    /// A line of the host's log, for the log of the client's call.
    Log(String),
    /// The host needs a part of the image to go on.
    Want(ImagePart),
    /// The last message after [`ClientRequest::Call`], and after any request that failed.
    Answer(Answer),
    /// The last message instead: an object of [`CallRequest::only_with`] is not on the host.
    Absent,
    /// The last message after [`ClientRequest::Report`].
    #[serde(rename = "offer")]
    Report(Box<HostReport>),
    /// The last message after [`ClientRequest::Find`]: the cids that the host has.
    Found(Vec<String>),
    /// The last message after [`ClientRequest::ReleaseDisk`]: the disk has no owner.
    #[serde(rename = "given_up")]
    DiskReleased,
}

/// A part of an image that the host asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImagePart {
    /// Its SHA-256, because the host has an image of the same size.
    Digest,
    /// Its bytes.
    Image,
}

/// The answer to a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The CPI response, as JSON.
    pub text: String,
    /// Whether the host waits for the client to report the delivery.
    #[serde(default)]
    pub waits: bool,
    /// Whether the call failed because the host lacks memory or disk space.
    #[serde(default)]
    pub lacks_room: bool,
    /// Whether the call failed because the host has more VMs of the group than
    /// [`CallRequest::same_group`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub crowded: bool,
}

/// The longest line from a client, in bytes: a request of
/// [`MAX_BYTES`](crate::rpc::request::MAX_BYTES), escaped.
pub const MAX_CLIENT_LINE: u64 = 64 << 20;

/// The longest line from a host, in bytes: a response of
/// [`MAX_FORWARDED`](crate::rpc::response::MAX_FORWARDED), escaped.
pub const MAX_SERVER_LINE: u64 = 4 << 20;

/// The most objects that one request names.
pub const MAX_OBJECTS: usize = 1000;

/// Sends `message` as one line.
///
/// # Errors
/// Those of `writer`.
pub fn send(writer: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message).map_err(io::Error::other)?;
    line.push(b'\n');
    writer.write_all(&line)?;
    writer.flush()
}

/// Receives one line of at most `max_bytes`.
///
/// # Errors
/// [`io::ErrorKind::UnexpectedEof`] if the other side has closed the stream,
/// [`io::ErrorKind::InvalidData`] for a line that is too long or no `T`.
pub fn receive<T: DeserializeOwned>(reader: &mut impl BufRead, max_bytes: u64) -> io::Result<T> {
    let mut line = Vec::new();
    reader.by_ref().take(max_bytes).read_until(b'\n', &mut line)?;
    if line.pop() != Some(b'\n') {
        let has_ended = line.len() as u64 + 1 < max_bytes;
        return Err(if has_ended {
            io::ErrorKind::UnexpectedEof
        } else {
            io::ErrorKind::InvalidData
        }
        .into());
    }
    // serde's error would quote the line, which may hold secrets.
    serde_json::from_slice(&line).map_err(|_| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(message: &impl Serialize) -> String {
        let mut bytes = Vec::new();
        send(&mut bytes, message).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn the_words_are_as_drawn() {
        let call = CallRequest { request: "{\n}".into(), ..CallRequest::default() };
        assert_eq!(line(&ClientRequest::Call(call)), "{\"call\":{\"request\":\"{\\n}\"}}\n");
        assert_eq!(line(&ServerMessage::Want(ImagePart::Digest)), "{\"want\":\"digest\"}\n");
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
            receive::<ServerMessage>(&mut lines, 1000).unwrap_err().kind(),
            io::ErrorKind::InvalidData,
            "two messages in one"
        );
        assert_eq!(
            receive::<ServerMessage>(&mut lines, 1000).unwrap(),
            ServerMessage::Log("y".into())
        );
        assert_eq!(
            receive::<ServerMessage>(&mut lines, 1000).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        assert_eq!(
            receive::<ServerMessage>(&mut lines, 1000).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn a_line_that_is_too_long_is_none() {
        let mut lines = &b"{\"log\":\"0123456789\"}\n"[..];
        assert_eq!(
            receive::<ServerMessage>(&mut lines, 10).unwrap_err().kind(),
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
            ClientRequest::Call(call).required_protocol()
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
            receive(&mut lines, 1000).unwrap(),
            ServerMessage::Greeting(Greeting { protocol: 0, .. })
        ));
    }
}
