//! The wire: newline-separated JSON on a UNIX socket, descriptors beside it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use qapi::Command;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::error::{Error, ErrorKind};

/// How long QEMU may take to answer a command. Its main loop stands still while an image is opened or closed.
const ANSWER: Duration = Duration::from_secs(60);
/// The longest message taken. The largest honest one, the schema, has 236 kB.
const LONGEST: usize = 8 << 20;
/// More events than this are kept by nobody; the oldest go.
const MOST_EVENTS: usize = 1024;

/// Why a command could not be done.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// QEMU said no.
    #[error("QEMU refused {command}: {description}")]
    Refused {
        /// What was asked.
        command: String,
        /// `GenericError`, `DeviceNotFound` or `CommandNotFound`; hardly ever anything else.
        class: String,
        /// In its own words.
        description: String,
    },
    /// QEMU went away, or another problem of the socket.
    #[error("the monitor '{}' is gone", path.display())]
    Gone {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No answer in time. The connection is of no more use: the answer may still come.
    #[error("QEMU at '{}' did not answer {command} within {} s", path.display(), patience.as_secs())]
    Silent {
        /// The socket.
        path: PathBuf,
        /// What was asked.
        command: String,
        /// For how long.
        patience: Duration,
    },
    /// What came is no QMP.
    #[error("the monitor '{}' sent {what}", path.display())]
    Nonsense {
        /// The socket.
        path: PathBuf,
        /// What came instead.
        what: String,
    },
}

impl From<MonitorError> for Error {
    fn from(error: MonitorError) -> Self {
        let hint = match &error {
            MonitorError::Silent { command, .. } if command == GREETING => {
                Some("another client may hold this monitor, or QEMU is stopped: see `ps` for its state")
            }
            MonitorError::Silent { .. } => Some("QEMU hangs, often on its storage; reboot_vm or delete_vm end it"),
            _ => None,
        };
        let kind = if matches!(error, MonitorError::Silent { .. }) { ErrorKind::Timeout } else { ErrorKind::Host };
        let made = Error::new(kind, error.to_string());
        let made = match error {
            MonitorError::Gone { source, .. } => made.because(source),
            _ => made,
        };
        hint.into_iter().fold(made, Error::hint)
    }
}

/// What is waited for first.
const GREETING: &str = "with its greeting";

/// Something QEMU told without being asked.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Event {
    /// `SHUTDOWN`, `DEVICE_DELETED`, …; newer QEMUs have more than anybody knows.
    #[serde(rename = "event")]
    pub name: String,
    /// Its fields.
    #[serde(default)]
    pub data: Value,
}

/// One client of one monitor.
#[derive(Debug)]
pub struct Connection {
    path: PathBuf,
    stream: UnixStream,
    /// Bytes of lines that are not complete.
    partial: Vec<u8>,
    events: VecDeque<Event>,
    last_id: u64,
}

impl Connection {
    /// Connects to the monitor at `path` and waits for its greeting, at most `patience` in all.
    pub async fn connect(path: &Path, patience: Duration) -> Result<Self, MonitorError> {
        let greet = async {
            let stream = UnixStream::connect(path).await.map_err(|e| gone(path, e))?;
            let mut connection =
                Self { path: path.to_owned(), stream, partial: Vec::new(), events: VecDeque::new(), last_id: 0 };
            // Some devices send events before the greeting.
            while connection.message().await?.get("QMP").is_none() {}
            connection.ask("qmp_capabilities", None, None).await?;
            Ok(connection)
        };
        let late = |_| MonitorError::Silent { path: path.to_owned(), command: GREETING.into(), patience };
        timeout(patience, greet).await.map_err(late)?
    }

    /// Does a command whose types `qapi` knows.
    pub async fn execute<C: Command>(&mut self, command: &C) -> Result<C::Ok, MonitorError> {
        let arguments = serde_json::to_value(command).expect("a command is plain data");
        let answer = self.raw(C::NAME, arguments).await?;
        C::Ok::deserialize(answer)
            .map_err(|e| self.nonsense(format!("an answer to {} that does not fit: {e}", C::NAME)))
    }

    /// Does a command by name.
    pub async fn raw(&mut self, command: &str, arguments: Value) -> Result<Value, MonitorError> {
        self.patiently(command, arguments, None).await
    }

    /// Does a command that carries a descriptor.
    pub async fn raw_with_fd(
        &mut self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, MonitorError> {
        self.patiently(command, arguments, Some(fd)).await
    }

    /// The next event. May be dropped and called again without losing one.
    pub async fn next_event(&mut self) -> Result<Event, MonitorError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            self.message().await?;
        }
    }

    async fn patiently(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, MonitorError> {
        let arguments = match arguments {
            Value::Object(map) if map.is_empty() => None,
            Value::Null => None,
            other => Some(other),
        };
        match timeout(ANSWER, self.ask(command, arguments, fd)).await {
            Ok(answered) => answered,
            Err(_) => {
                let command = command.to_owned();
                Err(MonitorError::Silent { path: self.path.clone(), command, patience: ANSWER })
            }
        }
    }

    async fn ask(
        &mut self,
        command: &str,
        arguments: Option<Value>,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, MonitorError> {
        self.last_id += 1;
        let mut request = json!({"execute": command, "id": self.last_id});
        if let Some(arguments) = arguments {
            request["arguments"] = arguments;
        }
        tracing::trace!(command, "qmp");
        self.send(format!("{request}\n").as_bytes(), fd).await.map_err(|e| gone(&self.path, e))?;
        loop {
            let mut message = self.message().await?;
            // The answer to a command that was given up on may come before ours.
            if message.get("id") != Some(&Value::from(self.last_id)) {
                continue;
            }
            if let Some(answer) = message.remove("return") {
                return Ok(answer);
            }
            let error = message.remove("error").unwrap_or_default();
            let text = |key: &str| error[key].as_str().unwrap_or("without saying why").to_owned();
            return Err(MonitorError::Refused {
                command: command.into(),
                class: text("class"),
                description: text("desc"),
            });
        }
    }

    /// The next message; events are kept as well as returned.
    async fn message(&mut self) -> Result<Map<String, Value>, MonitorError> {
        let line = self.line().await?;
        match serde_json::from_slice::<Value>(&line) {
            Ok(Value::Object(message)) => {
                if message.contains_key("event")
                    && let Ok(event) = Event::deserialize(Value::Object(message.clone()))
                {
                    if self.events.len() == MOST_EVENTS {
                        self.events.pop_front();
                    }
                    self.events.push_back(event);
                }
                Ok(message)
            }
            Ok(_) => Err(self.nonsense("a value that is no object")),
            Err(error) => Err(self.nonsense(format!("no JSON: {error}"))),
        }
    }

    /// The next line. Bytes of an incomplete one stay in `partial`, so this may be dropped and called again.
    async fn line(&mut self) -> Result<Vec<u8>, MonitorError> {
        let mut searched = 0;
        loop {
            if let Some(end) = self.partial[searched..].iter().position(|byte| *byte == b'\n') {
                let rest = self.partial.split_off(searched + end + 1);
                return Ok(std::mem::replace(&mut self.partial, rest));
            }
            searched = self.partial.len();
            if searched > LONGEST {
                return Err(self.nonsense("a line without end"));
            }
            self.stream.readable().await.map_err(|e| gone(&self.path, e))?;
            match self.stream.try_read_buf(&mut self.partial) {
                Ok(0) => return Err(gone(&self.path, io::ErrorKind::UnexpectedEof.into())),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(gone(&self.path, error)),
            }
        }
    }

    /// Sends all of `bytes`; the descriptor goes with the first of them.
    async fn send(&mut self, mut bytes: &[u8], mut fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        while !bytes.is_empty() {
            self.stream.writable().await?;
            let sent = self.stream.try_io(Interest::WRITABLE, || {
                let fds: Vec<_> = fd.iter().map(AsRawFd::as_raw_fd).collect();
                let rights = [ControlMessage::ScmRights(&fds)];
                let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
                let socket = self.stream.as_raw_fd();
                Ok(sendmsg::<()>(socket, &[io::IoSlice::new(bytes)], rights, MsgFlags::MSG_NOSIGNAL, None)?)
            });
            match sent {
                Ok(count) => {
                    bytes = &bytes[count..];
                    fd = None;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn nonsense(&self, what: impl Into<String>) -> MonitorError {
        MonitorError::Nonsense { path: self.path.clone(), what: what.into() }
    }
}

fn gone(path: &Path, source: io::Error) -> MonitorError {
    MonitorError::Gone { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Serves one client: greets, then answers each line with what `answer` makes of it.
    fn server(answer: impl Fn(&Value) -> String + Send + 'static) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"{\"event\":\"EARLY\"}\n{\"QMP\":{}}\n").unwrap();
            for line in BufReader::new(stream.try_clone().unwrap()).lines() {
                let request: Value = serde_json::from_str(&line.unwrap()).unwrap();
                let text = match request["execute"].as_str() {
                    Some("qmp_capabilities") => json!({"return": {}, "id": request["id"]}).to_string() + "\n",
                    _ => answer(&request),
                };
                if stream.write_all(text.as_bytes()).is_err() {
                    return;
                }
            }
        });
        (dir, path)
    }

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }

    #[test]
    fn unknown_events_and_late_answers_are_passed_over() {
        let (_dir, path) = server(|request| {
            format!(
                "{{\"event\":\"FROM_THE_FUTURE\",\"data\":{{\"x\":1}}}}\n{{\"return\":\"late\",\"id\":0}}\n{}\n",
                json!({"return": 7, "id": request["id"]})
            )
        });
        block_on(async {
            let mut connection = Connection::connect(&path, Duration::from_secs(5)).await.unwrap();
            assert_eq!(connection.raw("x", Value::Null).await.unwrap(), 7);
            assert_eq!(connection.next_event().await.unwrap().name, "EARLY");
            assert_eq!(connection.next_event().await.unwrap().data["x"], 1);
        });
    }

    #[test]
    fn a_refusal_keeps_its_class() {
        let (_dir, path) = server(|request| {
            json!({"error": {"class": "DeviceNotFound", "desc": "no"}, "id": request["id"]}).to_string() + "\n"
        });
        block_on(async {
            let mut connection = Connection::connect(&path, Duration::from_secs(5)).await.unwrap();
            let error = connection.raw("device_del", json!({"id": "x"})).await.unwrap_err();
            assert!(matches!(error, MonitorError::Refused { class, .. } if class == "DeviceNotFound"));
        });
    }

    #[test]
    fn garbage_and_silence_end_in_errors() {
        let (_dir, path) = server(|_| "not json\n".into());
        block_on(async {
            let mut connection = Connection::connect(&path, Duration::from_secs(5)).await.unwrap();
            assert!(matches!(connection.raw("x", Value::Null).await, Err(MonitorError::Nonsense { .. })));
        });
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("silent.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        let error = block_on(Connection::connect(&path, Duration::from_millis(20))).unwrap_err();
        assert!(Error::from(error).report().contains("another client may hold this monitor"));
    }
}
