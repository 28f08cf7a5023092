//! The exit record: how a run of a VM ended, in `exit.json`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::store::atomic;

/// How one run of a VM ended. QEMU exits with status 0 after a guest's poweroff, after `quit` and
/// after SIGTERM. Only the reason of its SHUTDOWN event distinguishes them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// The run that ended: the counter in `vm.json` when it started.
    pub run: u64,
    /// Exit status, if QEMU exited by itself. An adopted QEMU has neither status nor signal: only a
    /// parent process can read them.
    pub code: Option<i32>,
    /// The signal that ended QEMU.
    pub signal: Option<i32>,
    /// The reason of QMP's SHUTDOWN event: `guest-shutdown`, `host-qmp-quit`, `host-signal`, …; or
    /// the supervisor's own: `guest-panic`, `oom-kill`.
    pub reason: Option<String>,
    /// Whether the supervisor had pressed the power button because the host was shutting down.
    pub host_stopping: bool,
    /// When QEMU ended: RFC 3339, UTC.
    pub at: String,
}

/// What the exit of QEMU means for its VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The guest powered itself off: the VM stays off.
    PoweredOff,
    /// A call or the host's shutdown ended QEMU on purpose.
    Stopped,
    /// QEMU ended by a signal or with a failure, or the guest panicked.
    Crashed,
}

impl ExitRecord {
    /// Returns what this exit means for the VM.
    pub fn ending(&self) -> Ending {
        match self.reason.as_deref() {
            _ if self.signal.is_some() || self.code.is_some_and(|code| code != 0) => {
                Ending::Crashed
            }
            // An adopted QEMU that ended without a SHUTDOWN event did not shut down.
            None if self.code.is_none() => Ending::Crashed,
            Some("guest-panic") => Ending::Crashed,
            // A SIGTERM from outside: this program ends QEMU only with SIGKILL and `quit`.
            Some("host-signal") if !self.host_stopping => Ending::Crashed,
            Some("guest-shutdown") if !self.host_stopping => Ending::PoweredOff,
            _ => Ending::Stopped,
        }
    }

    /// Describes the exit in a few words, for logs and `vm list`.
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

    /// Writes the record, durably: after a power cut it decides whether the VM is started.
    pub fn write(&self, path: &Path) -> Result<()> {
        atomic::write(path, &serde_json::to_vec(self).expect("an exit record is plain data"))
    }

    /// Reads the record; `None` if the file does not exist.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the file cannot be read or parsed.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let damaged = |why: &str| {
            Error::new(ErrorKind::Corrupt, format!("'{}' cannot be used: {why}", path.display()))
                .hint("remove the file; the VM then counts as crashed and is started again")
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
    fn ending_depends_on_status_signal_and_reason() {
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
