//! The byte streams of a session, and what they run on: an ssh process or a Unix socket.

use std::io::{Read, Write};
use std::sync::Arc;

use crate::error::{Error, ErrorKind};

/// What carries the bytes of a session.
pub(super) trait Channel: Send + Sync {
    /// Closes the channel: blocked and later reads and writes fail or reach the end.
    fn close(&self);

    /// Records that the host has sent its greeting, so the connection is established.
    fn established(&self) {}

    /// Returns why the channel failed, once it has; `None` if it reports nothing.
    fn failure(&self) -> Option<ChannelFailure>;

    /// Returns whether the session joined an ssh connection of earlier calls and failed with that
    /// connection. A new connection may then work.
    fn has_lost_shared_connection(&self) -> bool {
        false
    }
}

/// The two byte streams of an open channel.
pub(super) struct Endpoints {
    /// Bytes from the host.
    pub reader: Box<dyn Read + Send>,
    /// Bytes to the host.
    pub writer: Box<dyn Write + Send>,
    /// What carries them.
    pub channel: Arc<dyn Channel>,
}

/// Why a channel failed, in words for the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ChannelFailure {
    /// The cause.
    pub cause: String,
    /// The operator's next step.
    pub hint: Option<&'static str>,
}

impl ChannelFailure {
    /// Returns the error for an `action` that failed because of this.
    pub fn into_error(self, action: &str) -> Error {
        let error = Error::new(ErrorKind::Host, format!("{action}: {}", self.cause));
        match self.hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}
