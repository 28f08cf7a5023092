//! Processes by descriptor: unlike a pid, a pidfd never refers to another process later.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use nix::sys::signal::Signal;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::{Error, Result};

/// A process, running or ended.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    fd: OwnedFd,
}

impl Process {
    /// Opens the process that has the number `pid` now. A caller that got the number from elsewhere
    /// must check afterwards that it still refers to the same process.
    ///
    /// # Errors
    /// ESRCH if there is no such process.
    pub fn open(pid: i32) -> Result<Self> {
        Self::find(pid)?
            .ok_or_else(|| Error::os(format!("open process {pid}"), rustix::io::Errno::SRCH))
    }

    /// As [`Self::open`], but returns `None` if there is no such process.
    pub fn find(pid: i32) -> Result<Option<Self>> {
        let Some(number) = Pid::from_raw(pid) else { return Ok(None) };
        match pidfd_open(number, PidfdFlags::empty()) {
            Ok(fd) => Ok(Some(Self { pid, fd })),
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(errno) => Err(Error::os(format!("open process {pid}"), errno)),
        }
    }

    /// Returns the pid, for messages.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends a signal. A process that has ended already is no error.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let number = rustix::process::Signal::from_named_raw(signal as i32)
            .expect("nix names only real signals");
        match pidfd_send_signal(&self.fd, number) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(Error::os(format!("send {signal} to process {}", self.pid), errno)),
        }
    }

    /// Waits until the process has ended, at most until `deadline`, and returns whether it has. A
    /// zombie has ended.
    pub fn wait_exit(&self, deadline: Instant) -> Result<bool> {
        wait_readable(&self.fd, deadline)
            .map_err(|e| Error::os(format!("wait for process {}", self.pid), e))
    }
}

/// Waits until `fd` has data or end of file, at most until `deadline`, and returns whether it has.
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

/// A process that the event loop of this thread watches.
#[derive(Debug)]
pub struct Watch(AsyncFd<OwnedFd>);

impl Watch {
    /// Starts to watch `process`, which need not be a child.
    #[allow(unsafe_code)]
    pub fn new(process: &Process) -> Result<Self> {
        let fd = process.fd.try_clone().map_err(|e| Error::os("copy a pidfd", e))?;
        // SAFETY: an OwnedFd is open, its number never changes, and it stays inside the AsyncFd
        // until that is dropped.
        let watch = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
        watch
            .map(Self)
            .map_err(|e| Error::os("watch a pidfd", std::io::Error::other(e.to_string())))
    }

    /// Waits until the process has ended. The future may be dropped and made again.
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
    fn wait_exit_of_a_zombie_returns_true() {
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
