//! A socket of this machine, behind which a socket unit starts `host serve` for each connection.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::session::{Below, Broken, Ends};
use crate::error::{Error, ErrorKind, Result};
use crate::patience::within;

/// Connects to `socket`.
///
/// # Errors
/// [`ErrorKind::Host`] if nobody listens there, or not to us; [`ErrorKind::Timeout`] if too many wait.
pub(super) fn open(socket: &Path, deadline: Instant) -> Result<Ends> {
    let path = socket.to_owned();
    let connected = within(deadline, move || {
        let stream = UnixStream::connect(path)?;
        let (reader, writer) = (stream.try_clone()?, stream.try_clone()?);
        io::Result::Ok(Ends {
            reader: Box::new(reader),
            writer: Box::new(writer),
            below: Arc::new(Socket(stream)),
        })
    });
    connected.unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into())).map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::PermissionDenied => "join the group of the socket",
            io::ErrorKind::TimedOut => {
                "more calls than the socket unit's MaxConnections wait: see what they wait for"
            }
            _ => "start the socket unit: systemctl enable --now bosh-qemu-cpi.socket",
        };
        let kind = if error.kind() == io::ErrorKind::TimedOut {
            ErrorKind::Timeout
        } else {
            ErrorKind::Host
        };
        Error::new(kind, format!("connect to '{}'", socket.display())).because(error).hint(hint)
    })
}

struct Socket(UnixStream);

impl Below for Socket {
    fn cut(&self) {
        // It may be gone.
        let _ = self.0.shutdown(Shutdown::Both);
    }

    fn why(&self) -> Option<Broken> {
        None
    }
}
