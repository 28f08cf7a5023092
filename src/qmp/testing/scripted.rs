//! A scripted monitor, for faults that a healthy QEMU does not produce.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use serde_json::Value;
use tempfile::TempDir;

/// Serves one client by a script, on a thread. Drop waits for the end of the script and propagates
/// its panic.
pub struct ScriptedMonitor {
    dir: TempDir,
    server: Option<JoinHandle<()>>,
}

/// The script's end of the connection.
pub struct Peer {
    stream: BufReader<UnixStream>,
}

impl ScriptedMonitor {
    /// Greets, negotiates, then runs `script`.
    pub fn negotiated(script: impl FnOnce(&mut Peer) + Send + 'static) -> Self {
        Self::new(|peer| {
            peer.send(r#"{"QMP": {"version": {}, "capabilities": []}}"#);
            let id = peer.expect("qmp_capabilities");
            peer.send(&format!(r#"{{"return": {{}}, "id": {id}}}"#));
            script(peer);
        })
    }

    /// Runs `script` on the first connection.
    pub fn new(script: impl FnOnce(&mut Peer) + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(socket_in(&dir)).unwrap();
        let serve = move || {
            let (stream, _) = listener.accept().unwrap();
            script(&mut Peer { stream: BufReader::new(stream) });
        };
        Self { dir, server: Some(std::thread::spawn(serve)) }
    }

    pub fn socket(&self) -> PathBuf {
        socket_in(&self.dir)
    }
}

fn socket_in(dir: impl AsRef<Path>) -> PathBuf {
    dir.as_ref().join("qmp.sock")
}

impl Drop for ScriptedMonitor {
    fn drop(&mut self) {
        let server = self.server.take().expect("only drop takes it").join();
        if !std::thread::panicking() {
            server.expect("the script failed");
        }
    }
}

impl Peer {
    /// Reads one command, which must be `command`, and returns its id.
    pub fn expect(&mut self, command: &str) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        let message: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(message["execute"], command);
        assert!(message["id"].is_u64(), "{line}");
        message["id"].clone()
    }

    /// Sends a line.
    pub fn send(&mut self, line: &str) {
        self.send_bytes(format!("{line}\r\n").as_bytes());
    }

    /// Sends bytes. Ignores that the client may have closed the connection.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        let _ = self.stream.get_mut().write_all(bytes);
    }

    /// Waits until the client closes.
    pub fn wait_for_close(&mut self) {
        let mut rest = String::new();
        while self.stream.read_line(&mut rest).is_ok_and(|read| read > 0) {}
    }
}
