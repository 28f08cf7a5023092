//! A proxy in front of a monitor that closes both connections after a number of commands: to QEMU,
//! its client was killed.

use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::Value;
use tempfile::TempDir;

/// A proxied monitor socket, for one connection.
pub struct ClosingProxy {
    dir: TempDir,
}

impl ClosingProxy {
    /// Proxies the monitor at `target`. Command number `last` (the negotiation is number 1) is
    /// executed, but its reply is dropped and both connections close.
    ///
    /// The proxy reads without receiving file descriptors, which discards the client's; each
    /// `add-fd` gets `file` instead.
    pub fn after(last: usize, target: &Path, file: File) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("cut.sock")).unwrap();
        let target = target.to_owned();
        std::thread::spawn(move || {
            let (client, _) = listener.accept().unwrap();
            let qemu = UnixStream::connect(target).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| relay_commands(&client, &qemu, &file));
                relay_messages(&qemu, &client, last);
                let _ = client.shutdown(Shutdown::Both);
                let _ = qemu.shutdown(Shutdown::Both);
            });
        });
        Self { dir }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("cut.sock")
    }
}

/// Forwards messages from QEMU to the client, up to the reply to drop.
fn relay_messages(qemu: &UnixStream, mut client: &UnixStream, last: usize) {
    let mut replies = 0;
    for line in BufReader::new(qemu).lines().map_while(Result::ok) {
        let message: Value = serde_json::from_str(&line).unwrap();
        replies += usize::from(message.get("id").is_some());
        if replies == last || client.write_all(format!("{line}\n").as_bytes()).is_err() {
            return;
        }
    }
}

/// Forwards commands from the client to QEMU.
fn relay_commands(client: &UnixStream, qemu: &UnixStream, file: &File) {
    for line in BufReader::new(client).lines().map_while(Result::ok) {
        let fds = [file.as_raw_fd()];
        let with_file = [ControlMessage::ScmRights(&fds)];
        let rights = if line.contains("\"add-fd\"") { &with_file[..] } else { &[] };
        let line = format!("{line}\n");
        if sendmsg::<()>(
            qemu.as_raw_fd(),
            &[IoSlice::new(line.as_bytes())],
            rights,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .is_err()
        {
            break;
        }
    }
    let _ = qemu.shutdown(Shutdown::Both);
}
