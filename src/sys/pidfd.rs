//! A process by descriptor: unlike a bare pid it never comes to mean another process.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use nix::sys::signal::Signal;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::{Error, Result};

/// A process, dead or alive.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    fd: OwnedFd,
}

impl Process {
    /// The process that has the number `pid` now. Whoever got the number from elsewhere must make sure afterwards that
    /// it still means the same process.
    pub fn open(pid: i32) -> Result<Self> {
        Self::find(pid)?
            .ok_or_else(|| Error::os(format!("open process {pid}"), rustix::io::Errno::SRCH))
    }

    /// As [`Self::open`], or `None` if there is no such process.
    pub fn find(pid: i32) -> Result<Option<Self>> {
        let Some(number) = Pid::from_raw(pid) else { return Ok(None) };
        match pidfd_open(number, PidfdFlags::empty()) {
            Ok(fd) => Ok(Some(Self { pid, fd })),
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(errno) => Err(Error::os(format!("open process {pid}"), errno)),
        }
    }

    /// Its number, for messages.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends a signal; a process that is gone already is fine.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let number = rustix::process::Signal::from_named_raw(signal as i32)
            .expect("nix names only real signals");
        match pidfd_send_signal(&self.fd, number) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(Error::os(format!("send {signal} to process {}", self.pid), errno)),
        }
    }

    /// Waits until the process has ended, at most until `deadline`. A dead child that nobody reaped has ended.
    pub fn wait_exit(&self, deadline: Instant) -> Result<bool> {
        wait_readable(&self.fd, deadline)
            .map_err(|e| Error::os(format!("wait for process {}", self.pid), e))
    }
}

/// Waits until there is something to read, or the end of it, at most until `deadline`.
pub fn wait_readable(fd: impl AsFd, deadline: Instant) -> std::io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], timeout.as_ref()) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

impl AsFd for Process {
    /// Readable once the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A process watched by the event loop of this thread.
#[derive(Debug)]
pub struct Watch(AsyncFd<OwnedFd>);

impl Watch {
    /// Begins to watch `process`, which need not be a child.
    #[allow(unsafe_code)]
    pub fn new(process: &Process) -> Result<Self> {
        let fd = process.fd.try_clone().map_err(|e| Error::os("copy a pidfd", e))?;
        // SAFETY: an OwnedFd is open, is one number for its life, and stays inside the AsyncFd until that is dropped.
        let watch = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
        watch
            .map(Self)
            .map_err(|e| Error::os("watch a pidfd", std::io::Error::other(e.to_string())))
    }

    /// Waits until the process has ended. May be dropped and called again.
    pub async fn ended(&self) -> Result<()> {
        self.0.readable().await.map_err(|e| Error::os("watch a pidfd", e))?.retain_ready();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_unreaped_child_has_ended() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::open(child.id() as i32).unwrap();
        assert!(!process.wait_exit(Instant::now()).unwrap());
        process.signal(Signal::SIGKILL).unwrap();
        assert!(process.wait_exit(Instant::now() + Duration::from_secs(10)).unwrap());
        child.wait().unwrap();
        process.signal(Signal::SIGKILL).unwrap();
        assert!(Process::find(i32::MAX).unwrap().is_none());
    }
}
