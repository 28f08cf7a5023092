//! A Unix socket of this machine. Its systemd socket unit starts `host serve` for each connection.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::channel::{Channel, ChannelFailure, Endpoints};
use crate::blocking_call::run_with_timeout;
use crate::error::{Error, ErrorKind, Result};

/// Connects to `socket`.
///
/// # Errors
/// [`ErrorKind::Host`] if no process listens there or the user has no access;
/// [`ErrorKind::Timeout`] if the socket's queue stays full until `deadline`.
pub(super) fn open(socket: &Path, deadline: Instant) -> Result<Endpoints> {
    let path = socket.to_owned();
    let connected = run_with_timeout(deadline, move || {
        let stream = UnixStream::connect(path)?;
        let (reader, writer) = (stream.try_clone()?, stream.try_clone()?);
        io::Result::Ok(Endpoints {
            reader: Box::new(reader),
            writer: Box::new(writer),
            channel: Arc::new(Socket(stream)),
        })
    });
    connected
        .unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into()))
        .map_err(|error| connect_error(socket, error))
}

fn connect_error(socket: &Path, error: io::Error) -> Error {
    let (kind, hint) = match error.kind() {
        io::ErrorKind::PermissionDenied => (
            ErrorKind::Host,
            "add the calling user to the socket's group (SocketGroup in bosh-qemu-cpi.socket)",
        ),
        io::ErrorKind::TimedOut => (
            ErrorKind::Timeout,
            "more calls wait than MaxConnections of the socket unit allows: see what they wait \
             for with `systemctl list-units 'bosh-qemu-cpi@*'`",
        ),
        _ => {
            (ErrorKind::Host, "start the socket unit: systemctl enable --now bosh-qemu-cpi.socket")
        }
    };
    Error::new(kind, format!("connect to '{}'", socket.display())).because(error).hint(hint)
}

struct Socket(UnixStream);

impl Channel for Socket {
    fn close(&self) {
        // Fails only if the host has closed the socket already.
        let _ = self.0.shutdown(Shutdown::Both);
    }

    fn failure(&self) -> Option<ChannelFailure> {
        None
    }
}
