//! The QEMU process a supervisor watches.

use std::process::ExitStatus;

use crate::error::Result;
use crate::sys::confine::Child;
use crate::sys::pidfd::{Process, Watch};

/// One it started, or one whose supervisor died.
#[derive(Debug)]
pub(super) enum QemuProcess {
    /// Started by this supervisor.
    Child(Child),
    /// Started by an earlier one. Only a parent learns how a process ended (waitid(2)).
    Adopted {
        /// The process.
        process: Process,
        /// Its end.
        end: Watch,
    },
}

impl QemuProcess {
    /// A QEMU of somebody else. Must be called in the event loop.
    pub(super) fn adopt(process: Process) -> Result<Self> {
        let end = Watch::new(&process)?;
        Ok(Self::Adopted { process, end })
    }

    /// Its process.
    pub(super) fn process(&self) -> &Process {
        match self {
            Self::Child(child) => child.process(),
            Self::Adopted { process, .. } => process,
        }
    }

    /// Waits for its end. Its status, if that can be known. May be dropped and called again.
    pub(super) async fn exited(&mut self) -> Result<Option<ExitStatus>> {
        match self {
            Self::Child(child) => child.exited().await.map(Some),
            Self::Adopted { end, .. } => end.ended().await.map(|()| None),
        }
    }
}
