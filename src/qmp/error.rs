//! Errors of the connection to a monitor.

use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Error, ErrorKind};

/// A monitor failure.
///
/// [`Refused`](MonitorError::Refused), [`InvalidReply`](MonitorError::InvalidReply) and
/// [`DeadlinePassed`](MonitorError::DeadlinePassed) leave the connection usable. Any other failure
/// makes it [`Poisoned`](MonitorError::Poisoned). Then only a new connection can tell whether the
/// command took effect.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// No process listens on the socket.
    #[error("connect to monitor '{path}'")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// QEMU accepted the connection but did not greet in time: it serves one client at a time.
    #[error("monitor '{path}' did not greet within {waited:.1?}")]
    Greeting {
        /// The socket.
        path: PathBuf,
        /// Time waited.
        waited: Duration,
    },
    /// QEMU returned an error and changed nothing.
    #[error("qemu refused '{command}': {desc}")]
    Refused {
        /// The command.
        command: String,
        /// `DeviceNotFound`, `CommandNotFound`, else `GenericError` (QEMU's QAPIErrorClass).
        class: String,
        /// QEMU's text, truncated and escaped.
        desc: String,
    },
    /// QEMU executed the command, but its reply does not match the documented type.
    #[error("qemu's reply to '{command}' has an unknown format")]
    InvalidReply {
        /// The command.
        command: String,
        /// The mismatch.
        source: serde_json::Error,
    },
    /// QEMU closed the connection: it exited or was killed.
    #[error("qemu closed the monitor")]
    Closed,
    /// QEMU did not reply in time. The command may still take effect.
    #[error("qemu did not answer '{command}' within {waited:.1?}")]
    Timeout {
        /// The command.
        command: String,
        /// Time waited.
        waited: Duration,
    },
    /// The call's deadline passed before the command was sent. The connection stays usable.
    #[error("the deadline passed before '{command}' was sent")]
    DeadlinePassed {
        /// The command.
        command: String,
    },
    /// QEMU sent something other than QMP.
    #[error("monitor protocol: {0}")]
    Protocol(String),
    /// An earlier exchange on this connection did not complete.
    #[error("the monitor connection is not usable after an earlier failure")]
    Poisoned,
    /// The host refused a descriptor or memory for the connection.
    #[error("{action}")]
    Host {
        /// The action that failed.
        action: &'static str,
        /// The cause.
        source: std::io::Error,
    },
}

impl MonitorError {
    /// Whether QEMU refused with a text that contains `part`. QEMU has no specific error class for
    /// most refusals.
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
                    "another client may hold the monitor, or QEMU hangs: \
                     QEMU serves one client per socket",
                ),
            ),
            MonitorError::Timeout { .. } => {
                (ErrorKind::Timeout, Some("QEMU may be stopped, or its storage may not answer"))
            }
            MonitorError::DeadlinePassed { .. } => (ErrorKind::Timeout, None),
            MonitorError::Closed => {
                (ErrorKind::Host, Some("QEMU has exited: see its log in the VM's directory"))
            }
            MonitorError::Connect { .. } => {
                (ErrorKind::Host, Some("check whether the VM's QEMU is running"))
            }
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
