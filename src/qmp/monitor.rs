//! A connection for calls: synchronous, with one deadline for the whole job.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use qapi::Command;
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::time::timeout_at;

use super::connection::{Connection, Event, MonitorError};
use crate::error::{Error, Result};

/// QEMU greets within milliseconds unless it hangs or serves another client.
const GREETING: Duration = Duration::from_secs(5);

/// QEMU's monitor for calls.
#[derive(Debug)]
pub struct Monitor {
    runtime: Runtime,
    connection: Connection,
}

impl Monitor {
    /// Connects to the monitor at `path`, by `deadline` at the latest.
    pub fn connect(path: &Path, deadline: Instant) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|e| Error::os("start an event loop", e))?;
        let patience = GREETING.min(deadline.saturating_duration_since(Instant::now()));
        let connection = runtime.block_on(Connection::connect(path, patience))?;
        Ok(Self { runtime, connection })
    }

    /// Does a command whose types `qapi` knows.
    pub fn execute<C: Command>(&mut self, command: &C) -> Result<C::Ok, MonitorError> {
        self.runtime.block_on(self.connection.execute(command))
    }

    /// Does a command by name.
    pub fn raw(&mut self, command: &str, arguments: Value) -> Result<Value, MonitorError> {
        self.runtime.block_on(self.connection.raw(command, arguments))
    }

    /// Does a command that carries a descriptor.
    pub fn raw_with_fd(&mut self, command: &str, arguments: Value, fd: BorrowedFd<'_>) -> Result<Value, MonitorError> {
        self.runtime.block_on(self.connection.raw_with_fd(command, arguments, fd))
    }

    /// Waits until `deadline` for an event that `wanted` takes; others are passed over.
    pub fn wait_for<T>(
        &mut self,
        deadline: Instant,
        mut wanted: impl FnMut(&Event) -> Option<T>,
    ) -> Result<Option<T>, MonitorError> {
        let connection = &mut self.connection;
        let search = async {
            loop {
                if let Some(found) = wanted(&connection.next_event().await?) {
                    return Ok(found);
                }
            }
        };
        match self.runtime.block_on(async { timeout_at(deadline.into(), search).await }) {
            Ok(found) => found.map(Some),
            Err(_) => Ok(None),
        }
    }
}
