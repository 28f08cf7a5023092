//! The QEMU process that a supervisor watches.

use std::process::ExitStatus;

use crate::error::Result;
use crate::sys::confine::Child;
use crate::sys::pidfd::{Process, Watch};

/// A QEMU process, started or adopted by this supervisor.
#[derive(Debug)]
pub(super) enum QemuProcess {
    /// Started by this supervisor, so its exit status can be read.
    Child(Child),
    /// Started by an earlier supervisor. Only a parent can read a process's exit status
    /// (waitid(2)).
    Adopted {
        /// The process.
        process: Process,
        /// Reports the end of the process.
        end: Watch,
    },
}

impl QemuProcess {
    /// Watches a QEMU that another supervisor started. Must be called in the event loop.
    pub(super) fn adopt(process: Process) -> Result<Self> {
        let end = Watch::new(&process)?;
        Ok(Self::Adopted { process, end })
    }

    /// Returns the process.
    pub(super) fn process(&self) -> &Process {
        match self {
            Self::Child(child) => child.process(),
            Self::Adopted { process, .. } => process,
        }
    }

    /// Waits for the end of QEMU and returns its exit status, or `None` for an adopted one. The
    /// future may be dropped and made again.
    pub(super) async fn exited(&mut self) -> Result<Option<ExitStatus>> {
        match self {
            Self::Child(child) => child.exited().await.map(Some),
            Self::Adopted { end, .. } => end.ended().await.map(|()| None),
        }
    }
}
