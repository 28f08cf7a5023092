//! What can go wrong between us and a monitor.

use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Error, ErrorKind};

/// A failure of the monitor. After every one but [`Refused`](MonitorError::Refused),
/// [`Answer`](MonitorError::InvalidReply) and [`Late`](MonitorError::DeadlinePassed) the connection is [`Poisoned`](MonitorError::Poisoned), and whether the command took
/// effect has to be asked on a new one.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// Nobody listens on the socket.
    #[error("connect to monitor '{path}'")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The socket was reached, but QEMU did not greet in time: it serves one client at a time.
    #[error("monitor '{path}' did not greet within {waited:.1?}")]
    Greeting {
        /// The socket.
        path: PathBuf,
        /// How long we waited.
        waited: Duration,
    },
    /// QEMU answered with an error and did nothing.
    #[error("qemu refused '{command}': {desc}")]
    Refused {
        /// The command.
        command: String,
        /// `DeviceNotFound`, `CommandNotFound`, else `GenericError` (QEMU's QAPIErrorClass).
        class: String,
        /// QEMU's text, cut and escaped.
        desc: String,
    },
    /// QEMU did what it was asked, but its answer has another shape than documented.
    #[error("qemu's answer to '{command}' has an unknown shape")]
    InvalidReply {
        /// The command.
        command: String,
        /// What did not fit.
        source: serde_json::Error,
    },
    /// QEMU closed the connection: it exited or was killed.
    #[error("qemu closed the monitor")]
    Closed,
    /// The command got no answer in time. It may still take effect.
    #[error("qemu did not answer '{command}' within {waited:.1?}")]
    Timeout {
        /// The command.
        command: String,
        /// How long we waited.
        waited: Duration,
    },
    /// The call's deadline was over before the command was sent. The connection stays usable.
    #[error("no time is left for '{command}'")]
    DeadlinePassed {
        /// The command.
        command: String,
    },
    /// What came is not QMP.
    #[error("monitor protocol: {0}")]
    Protocol(String),
    /// An earlier exchange on this connection did not end.
    #[error("the monitor connection is not usable after an earlier failure")]
    Poisoned,
    /// The host refused a descriptor or memory for the connection.
    #[error("{action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}

impl MonitorError {
    /// Whether QEMU refused with a text that contains `part`. QEMU has no finer error classes for most refusals.
    pub fn refused_with(&self, part: &str) -> bool {
        matches!(self, Self::Refused { desc, .. } if desc.contains(part))
    }

    /// Whether QEMU refused because there is no such device.
    pub fn is_device_not_found(&self) -> bool {
        matches!(self, Self::Refused { class, .. } if class == "DeviceNotFound")
    }
}

impl From<MonitorError> for Error {
    fn from(error: MonitorError) -> Self {
        let (kind, hint) = match &error {
            MonitorError::Greeting { .. } => (
                ErrorKind::Timeout,
                Some(
                    "another client may hold the monitor, or QEMU hangs: QEMU serves one client per socket",
                ),
            ),
            MonitorError::Timeout { .. } => {
                (ErrorKind::Timeout, Some("QEMU may be stopped, or its storage may not answer"))
            }
            MonitorError::DeadlinePassed { .. } => (ErrorKind::Timeout, None),
            MonitorError::Closed => {
                (ErrorKind::Host, Some("QEMU exited: its log in the VM's directory may say why"))
            }
            MonitorError::Connect { .. } => (ErrorKind::Host, Some("is the VM's QEMU running?")),
            _ => (ErrorKind::Host, None),
        };
        let mut message = error.to_string();
        // `because` would repeat an error that has no source of its own.
        let outer = |message| Error::new(kind, message);
        let outer = match error {
            MonitorError::Connect { source, .. } | MonitorError::Host { source, .. } => {
                outer(message).because(source)
            }
            MonitorError::InvalidReply { source, .. } => outer(message).because(source),
            MonitorError::Refused { class, .. } if class != "GenericError" => {
                message.push_str(&format!(" ({class})"));
                outer(message)
            }
            _ => outer(message),
        };
        match hint {
            Some(hint) => outer.hint(hint),
            None => outer,
        }
    }
}
