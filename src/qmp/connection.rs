//! One connection to one monitor socket.
//!
//! ```text
//!             connect               write            reply with its id
//!   (socket) ─────────► READY ─────────────► BUSY ─────────────────────► READY
//!                         │                   │ deadline, end of file, invalid QMP, future dropped
//!                         │ next_event        ▼
//!                         └──────► READY    POISONED: refuses everything
//! ```
//!
//! A monitor answers commands one after the other, with events anywhere in between. So there is no
//! reader task: the method that waits for a reply or an event reads the socket, and queues events
//! that precede a reply. An incomplete exchange poisons the connection, because its reply may still
//! arrive.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use qapi::Command;
use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout_at};

use super::error::MonitorError;
use super::event::Event;
use super::wire::{self, LONGEST_LINE, Message};
use crate::crash;

/// Longest time for connecting, the greeting and the negotiation together, when QEMU is known to
/// run.
pub const MONITOR_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time to wait for a query (`query-…`, `qom-…`).
pub const QUERY_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time to wait for any other command: those on devices and block nodes wait until the
/// guest's I/O has drained.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// Bytes requested by one read.
const READ_SIZE: usize = 16 << 10;
/// Time between two attempts to connect to a socket whose backlog is full.
const BACKLOG_RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// A negotiated connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// Bytes not decoded yet. No complete line while a method waits for more.
    received: Vec<u8>,
    events: EventQueue,
    last_id: u64,
    deadline: Option<Instant>,
    /// An exchange began and did not complete.
    poisoned: bool,
}

impl Connection {
    /// Connects to `path`, waits for the greeting and negotiates.
    ///
    /// # Errors
    /// [`MonitorError::Connect`] if no QEMU listens, [`MonitorError::Greeting`] at `deadline`: QEMU
    /// serves another client.
    pub async fn connect(path: &Path, deadline: Instant) -> Result<Self, MonitorError> {
        let begin = Instant::now();
        let greeted = async {
            let mut connection = Self {
                stream: connect_to(path).await?,
                received: Vec::new(),
                events: EventQueue::default(),
                last_id: 0,
                deadline: Some(deadline),
                poisoned: false,
            };
            // Some devices send events before the greeting.
            while !matches!(connection.receive().await?, Message::Greeting) {}
            connection.execute(&qapi::qmp::qmp_capabilities { enable: None }).await?;
            connection.deadline = None;
            Ok(connection)
        };
        let late = || MonitorError::Greeting { path: path.to_owned(), waited: begin.elapsed() };
        match timeout_at(deadline.into(), greeted).await {
            Ok(Err(MonitorError::Timeout { .. })) | Err(_) => Err(late()),
            Ok(connected) => connected,
        }
    }

    /// Sets the deadline for all following commands.
    pub fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = Some(deadline);
    }

    /// Executes a typed command. Dropping the future before it completes poisons the connection
    /// ([`MonitorError::Poisoned`]).
    ///
    /// # Errors
    /// [`MonitorError::Refused`], [`MonitorError::InvalidReply`] and
    /// [`MonitorError::DeadlinePassed`] leave the connection usable; the other errors do not.
    pub async fn execute<C: Command>(&mut self, command: &C) -> Result<C::Ok, MonitorError> {
        let answer = self.exchange(C::NAME, command, None).await?;
        parse_reply(C::NAME, &answer)
    }

    /// Executes any command. `arguments` is a JSON object.
    ///
    /// # Errors
    /// Those of [`execute`](Self::execute).
    pub async fn raw(&mut self, command: &str, arguments: &Value) -> Result<Value, MonitorError> {
        let answer = self.exchange(command, arguments, None).await?;
        parse_reply(command, &answer)
    }

    /// Executes a command that takes a file descriptor: `add-fd`, `getfd`. QEMU gets a copy.
    ///
    /// # Errors
    /// Those of [`execute`](Self::execute).
    pub async fn execute_with_fd<C: Command>(
        &mut self,
        command: &C,
        fd: BorrowedFd<'_>,
    ) -> Result<C::Ok, MonitorError> {
        let answer = self.exchange(C::NAME, command, Some(fd)).await?;
        parse_reply(C::NAME, &answer)
    }

    /// Returns the next event, waiting if none is queued. Dropping the future loses no event.
    ///
    /// # Errors
    /// [`MonitorError::Closed`] once QEMU has closed the connection and all events are read,
    /// [`MonitorError::Protocol`].
    pub async fn next_event(&mut self) -> Result<Event, MonitorError> {
        if self.poisoned {
            return Err(MonitorError::Poisoned);
        }
        loop {
            if let Some(event) = self.events.pop() {
                return Ok(event);
            }
            if let Message::Event(event) = self.receive().await? {
                return Ok(event);
            }
        }
    }

    /// Returns the first event that `wanted` accepts, or `None` at `until`. Drops the events before
    /// it.
    ///
    /// # Errors
    /// Those of [`next_event`](Self::next_event).
    pub async fn wait_event(
        &mut self,
        wanted: impl Fn(&Event) -> bool,
        until: Instant,
    ) -> Result<Option<Event>, MonitorError> {
        loop {
            match timeout_at(until.into(), self.next_event()).await {
                Err(_) => return Ok(None),
                Ok(Ok(event)) if !wanted(&event) => {}
                Ok(event) => return event.map(Some),
            }
        }
    }

    async fn exchange<A: Serialize>(
        &mut self,
        command: &str,
        arguments: &A,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Box<RawValue>, MonitorError> {
        if self.poisoned {
            return Err(MonitorError::Poisoned);
        }
        self.last_id += 1;
        let line = wire::encode(self.last_id, command, arguments)?;
        let begin = Instant::now();
        let limit = begin + timeout_of(command);
        let until = self.deadline.map_or(limit, |deadline| deadline.min(limit));
        if until <= begin {
            return Err(MonitorError::DeadlinePassed { command: command.to_owned() });
        }
        tracing::trace!(command, id = self.last_id, "qmp");

        self.poisoned = true;
        let reply = timeout_at(until.into(), async {
            self.send(&line, fd).await.map_err(closed_or_host_error("write to monitor"))?;
            crash::point!("qmp {command}: sent");
            self.receive_reply(self.last_id).await
        });
        let timeout =
            |_| MonitorError::Timeout { command: command.to_owned(), waited: begin.elapsed() };
        let reply = reply.await.map_err(timeout)??;
        self.poisoned = false;
        crash::point!("qmp {command}: answered");
        reply.map_err(|refusal| refusal.into_error(command))
    }

    /// Writes `line`. `fd` accompanies the first bytes, where QEMU expects it.
    async fn send(&mut self, line: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut sent = 0;
        if let Some(fd) = fd {
            sent = self
                .stream
                .async_io(Interest::WRITABLE, || send_with_fd(&self.stream, line, fd))
                .await?;
        }
        self.stream.write_all(&line[sent..]).await
    }

    /// Returns the reply to command `id`. Queues events that precede it, drops replies to other
    /// commands.
    async fn receive_reply(
        &mut self,
        id: u64,
    ) -> Result<Result<Box<RawValue>, wire::ErrorReply>, MonitorError> {
        loop {
            match self.receive().await? {
                Message::Reply { id: theirs, result } if theirs == id => return Ok(result),
                Message::Reply { id: theirs, .. } => {
                    tracing::debug!(id = theirs, "dropping a qmp reply to another command");
                }
                Message::Event(event) => self.events.push(event),
                Message::Greeting => return Err(MonitorError::Protocol("greeted twice".into())),
            }
        }
    }

    /// Returns the next message. Dropping the future loses nothing: `received` keeps what was read.
    async fn receive(&mut self) -> Result<Message, MonitorError> {
        let mut searched = 0;
        loop {
            if let Some(length) = self.received[searched..].iter().position(|byte| *byte == b'\n') {
                let end = searched + length;
                let message = wire::decode(&self.received[..end]);
                self.received.drain(..=end);
                return message;
            }
            searched = self.received.len();
            if searched > LONGEST_LINE {
                return Err(MonitorError::Protocol(format!(
                    "a line is longer than {LONGEST_LINE} bytes"
                )));
            }
            self.received.reserve(READ_SIZE);
            let mut chunk = (&mut self.stream).take(READ_SIZE as u64);
            match chunk
                .read_buf(&mut self.received)
                .await
                .map_err(closed_or_host_error("read from monitor"))?
            {
                0 => return Err(MonitorError::Closed),
                _ => continue,
            }
        }
    }
}

/// Connects. If QEMU's backlog of one is full, the kernel returns EAGAIN at once, and the call
/// tries again.
async fn connect_to(path: &Path) -> Result<UnixStream, MonitorError> {
    loop {
        match UnixStream::connect(path).await {
            Ok(stream) => return Ok(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                sleep(BACKLOG_RETRY_INTERVAL).await;
            }
            Err(source) => return Err(MonitorError::Connect { path: path.to_owned(), source }),
        }
    }
}

fn send_with_fd(stream: &UnixStream, line: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
    let fds = [fd.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    Ok(sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(line)],
        &rights,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?)
}

fn timeout_of(command: &str) -> Duration {
    if command.starts_with("query-") || command.starts_with("qom-") {
        QUERY_TIMEOUT
    } else {
        COMMAND_TIMEOUT
    }
}

fn parse_reply<T: serde::de::DeserializeOwned>(
    command: &str,
    answer: &RawValue,
) -> Result<T, MonitorError> {
    let shape = |source| MonitorError::InvalidReply { command: command.to_owned(), source };
    serde_json::from_str(answer.get()).map_err(shape)
}

fn closed_or_host_error(action: &'static str) -> impl Fn(io::Error) -> MonitorError {
    move |source| match source.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => MonitorError::Closed,
        _ => MonitorError::Host { action, source },
    }
}

/// Events that arrived while no method waited for one. A guest can cause events, so a full queue
/// drops the oldest. No caller relies on an event: it only prompts a query. An event has a few kB
/// at most, see `wire`.
#[derive(Debug, Default)]
struct EventQueue {
    events: VecDeque<Event>,
}

impl EventQueue {
    const LONGEST: usize = 256;

    fn push(&mut self, event: Event) {
        if self.events.len() == Self::LONGEST {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn pop(&mut self) -> Option<Event> {
        self.events.pop_front()
    }
}

#[cfg(test)]
mod tests;
