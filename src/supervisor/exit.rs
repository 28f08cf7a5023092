//! How a run ended, kept in `exit.json`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::store::atomic;

/// How one run of a VM ended. QEMU exits with 0 for a guest's poweroff, `quit` and SIGTERM alike, so the reason of
/// its SHUTDOWN event tells them apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// The run it is about: `vm.json`'s counter at the start.
    pub run: u64,
    /// Exit status, if QEMU exited by itself. Neither this nor a signal: it was adopted, so only the reason is known.
    pub code: Option<i32>,
    /// Signal that ended QEMU.
    pub signal: Option<i32>,
    /// Reason of QMP's SHUTDOWN event: `guest-shutdown`, `host-qmp-quit`, `host-signal`, …; or ours:
    /// `guest-panic`, `oom-kill`.
    pub reason: Option<String>,
    /// Whether the host was shutting down and had pressed the power button.
    pub host_stopping: bool,
    /// When, UTC.
    pub at: String,
}

/// What an exit means for the VM's future.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The guest powered itself off: it stays off.
    PoweredOff,
    /// The host ended it on purpose.
    Stopped,
    /// A signal, a failure, a panic.
    Crashed,
}

impl ExitRecord {
    /// What this exit means.
    pub fn ending(&self) -> Ending {
        match self.reason.as_deref() {
            _ if self.signal.is_some() || self.code.is_some_and(|code| code != 0) => {
                Ending::Crashed
            }
            // An adopted QEMU that gave no reason did not shut down.
            None if self.code.is_none() => Ending::Crashed,
            Some("guest-panic") => Ending::Crashed,
            // Somebody's SIGTERM, not ours: ours are SIGKILL and `quit`.
            Some("host-signal") if !self.host_stopping => Ending::Crashed,
            Some("guest-shutdown") if !self.host_stopping => Ending::PoweredOff,
            _ => Ending::Stopped,
        }
    }

    /// In a few words, for logs and `vm list`.
    pub fn describe(&self) -> String {
        let how = match (self.signal, self.code) {
            (Some(signal), _) => format!("killed by signal {signal}"),
            (None, Some(code)) => format!("exit status {code}"),
            (None, None) => "ended".to_owned(),
        };
        match &self.reason {
            Some(reason) => format!("{how} ({reason})"),
            None => how,
        }
    }

    /// Writes the record; durable, because whether a VM is started after a power cut depends on it.
    pub fn write(&self, path: &Path) -> Result<()> {
        atomic::write(path, &serde_json::to_vec(self).expect("an exit record is plain data"))
    }

    /// Reads the record, if there is one.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let damaged = |why: &str| {
            Error::new(ErrorKind::Corrupt, format!("'{}' can not be used: {why}", path.display()))
                .hint("remove the file: the VM counts as crashed then, and is started again")
        };
        match std::fs::read(path) {
            Err(error)
                if error.kind() == std::io::ErrorKind::NotFound && !atomic::is_symlink(path) =>
            {
                Ok(None)
            }
            Err(error) => Err(damaged(&error.to_string())),
            Ok(text) => {
                serde_json::from_slice(&text).map(Some).map_err(|error| damaged(&error.to_string()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(code: Option<i32>, signal: Option<i32>, reason: Option<&str>) -> ExitRecord {
        ExitRecord {
            run: 1,
            code,
            signal,
            reason: reason.map(Into::into),
            host_stopping: false,
            at: String::new(),
        }
    }

    #[test]
    fn the_reason_decides_where_the_status_can_not() {
        assert_eq!(exit(Some(0), None, Some("guest-shutdown")).ending(), Ending::PoweredOff);
        assert_eq!(exit(Some(0), None, Some("host-qmp-quit")).ending(), Ending::Stopped);
        assert_eq!(exit(Some(0), None, Some("host-signal")).ending(), Ending::Crashed);
        assert_eq!(exit(Some(0), None, None).ending(), Ending::Stopped);
        assert_eq!(exit(Some(1), None, Some("guest-panic")).ending(), Ending::Crashed);
        assert_eq!(exit(None, Some(9), None).ending(), Ending::Crashed);
        assert_eq!(exit(None, None, None).ending(), Ending::Crashed);
        assert_eq!(exit(None, None, Some("guest-shutdown")).ending(), Ending::PoweredOff);
        let host =
            ExitRecord { host_stopping: true, ..exit(Some(0), None, Some("guest-shutdown")) };
        assert_eq!(host.ending(), Ending::Stopped);
    }
}
