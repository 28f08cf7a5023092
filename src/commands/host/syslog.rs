//! The host's own log of calls over ssh: sshd sends their standard error to the caller, so this
//! host would keep nothing of it.

use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

/// The socket of every syslog daemon and of systemd's journal.
pub(super) const SOCKET: &str = "/dev/log";

/// Facility `daemon`, severity `info` (RFC 3164). The line itself names its level.
const PRIORITY: u8 = 3 * 8 + 6;

/// Writes lines to the host's log. A host without a log or with a full one loses the line: a write
/// neither fails nor blocks.
pub(super) struct Syslog(Option<UnixDatagram>);

impl Syslog {
    /// Connects to the daemon at `socket`, if there is one.
    pub fn at(socket: &Path) -> Self {
        let open = || {
            let log = UnixDatagram::unbound()?;
            log.connect(socket)?;
            log.set_nonblocking(true)?;
            io::Result::Ok(log)
        };
        Self(open().ok())
    }
}

impl Write for Syslog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(log) = &self.0 {
            let head = format!("<{PRIORITY}>{}[{}]: ", env!("CARGO_PKG_NAME"), std::process::id());
            let _ = log.send(&[head.as_bytes(), line.trim_ascii_end()].concat());
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_message_and_a_missing_log_is_not_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("log");
        Syslog::at(&socket).write_all(b"lost\n").unwrap();
        let journal = UnixDatagram::bind(&socket).unwrap();
        Syslog::at(&socket).write_all(b"done\n").unwrap();
        let mut message = [0; 100];
        let count = journal.recv(&mut message).unwrap();
        let message = std::str::from_utf8(&message[..count]).unwrap();
        assert_eq!(message, format!("<30>bosh-qemu-cpi[{}]: done", std::process::id()));
    }
}
