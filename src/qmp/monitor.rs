//! The monitor connection of a CPI call: blocking, with one deadline for the whole call.
//!
//! A call is a sequence of steps, each waiting for the one before, so it needs no async. The
//! runtime inside is a reactor and a timer on the calling thread; creating it costs about 50 µs.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Instant;

use qapi::Command;
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};

use super::connection::{Connection, MONITOR_CONNECT_TIMEOUT};
use super::error::MonitorError;
use super::event::Event;

/// A connected monitor. QEMU serves no other client while it lives: drop it as soon as the call's
/// work is done.
///
/// It must not be used inside an async runtime; the supervisor uses [`Connection`].
#[derive(Debug)]
pub struct Monitor {
    // Dropped before the runtime, which must outlive it.
    connection: Connection,
    runtime: Runtime,
}

impl Monitor {
    /// Connects to the socket at `path` within [`MONITOR_CONNECT_TIMEOUT`]. `deadline` applies to
    /// all commands.
    ///
    /// # Errors
    /// Those of [`Connection::connect`].
    pub fn connect(path: &Path, deadline: Instant) -> Result<Self, MonitorError> {
        let runtime =
            Builder::new_current_thread().enable_io().enable_time().build().map_err(|source| {
                MonitorError::Host { action: "start a runtime for the monitor", source }
            })?;
        let greeted_by = deadline.min(Instant::now() + MONITOR_CONNECT_TIMEOUT);
        let mut connection = runtime.block_on(Connection::connect(path, greeted_by))?;
        connection.set_deadline(deadline);
        Ok(Self { connection, runtime })
    }

    /// See [`Connection::execute`].
    pub fn execute<C: Command>(&mut self, command: &C) -> Result<C::Ok, MonitorError> {
        self.runtime.block_on(self.connection.execute(command))
    }

    /// See [`Connection::raw`].
    pub fn raw(&mut self, command: &str, arguments: &Value) -> Result<Value, MonitorError> {
        self.runtime.block_on(self.connection.raw(command, arguments))
    }

    /// Gives QEMU a copy of `fd` in a new fd set and returns the set's id. QEMU opens it as
    /// `/dev/fdset/<id>`. `opaque` is a string by which later calls find the fd set.
    ///
    /// # Errors
    /// Those of [`Connection::execute`].
    pub fn add_fd(&mut self, fd: BorrowedFd<'_>, opaque: &str) -> Result<i64, MonitorError> {
        let command = qapi::qmp::add_fd { fdset_id: None, opaque: Some(opaque.to_owned()) };
        self.runtime
            .block_on(self.connection.execute_with_fd(&command, fd))
            .map(|added| added.fdset_id)
    }

    /// See [`Connection::wait_event`].
    pub fn wait_event(
        &mut self,
        wanted: impl Fn(&Event) -> bool,
        until: Instant,
    ) -> Result<Option<Event>, MonitorError> {
        self.runtime.block_on(self.connection.wait_event(wanted, until))
    }

    /// Runs an async exchange to its end, such as those in [`power`](super::power).
    pub fn run<T>(&mut self, exchange: impl AsyncFnOnce(&mut Connection) -> T) -> T {
        self.runtime.block_on(exchange(&mut self.connection))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::qmp::query::QueryStatus;
    use crate::qmp::testing::{Guest, Image};

    #[test]
    fn qemu_serves_one_client_at_a_time() {
        let guest = Guest::new(Image::Answering, 0);
        let first = guest.monitor();
        let second = Monitor::connect(&guest.socket(), Instant::now() + Duration::from_millis(200));
        assert!(matches!(second, Err(MonitorError::Greeting { .. })), "{second:?}");
        drop(first);
        assert!(guest.monitor().execute(&QueryStatus {}).unwrap().is_prelaunch());
    }
}
