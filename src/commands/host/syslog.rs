//! The host's own log of calls through ssh: standard error is their caller's there, and goes with them.

use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

/// Where every syslog and systemd's journal listen.
pub(super) const SOCKET: &str = "/dev/log";

/// Facility `daemon`, severity `info` (RFC 3164): what is a warning is said in the line.
const PRIORITY: u8 = 3 * 8 + 6;

/// Writes lines to the host's log, if it has one. Nothing fails for it, and nothing waits for it.
pub(super) struct Syslog(Option<UnixDatagram>);

impl Syslog {
    /// The one that listens at `socket`.
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
            // One that is full has other sorrows than this line.
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
    fn a_line_is_one_message_and_a_host_without_a_log_is_no_failure() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("log");
        Syslog::at(&socket).write_all(b"nobody listens\n").unwrap();
        let journal = UnixDatagram::bind(&socket).unwrap();
        Syslog::at(&socket).write_all(b"done\n").unwrap();
        let mut heard = [0; 100];
        let count = journal.recv(&mut heard).unwrap();
        let heard = std::str::from_utf8(&heard[..count]).unwrap();
        assert_eq!(heard, format!("<30>bosh-qemu-cpi[{}]: done", std::process::id()));
    }
}
