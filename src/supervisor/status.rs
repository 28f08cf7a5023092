//! The status of a VM, for people: from the kernel's locks, its QEMU and its exit record.

use std::time::Instant;

use serde::Serialize;
use serde_json::{Value, json};

use super::exit::{Ending, ExitRecord};
use super::power::{PowerState, power_state};
use crate::error::Result;
use crate::qmp::error::MonitorError;
use crate::qmp::monitor::Monitor;
use crate::qmp::query::QueryStatus;
use crate::schema::printable;
use crate::store::VmPaths;
use crate::sys::pidlock;

/// The status of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// The state.
    pub state: State,
    /// Why the VM is in that state, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The pid of its QEMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
}

/// The state of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// QEMU runs and its vCPUs run.
    Running,
    /// QEMU runs and its vCPUs do not. The reason is QEMU's RunState and, after an I/O error, the
    /// disk.
    Paused,
    /// QEMU runs and does not answer: it hangs, or another client uses the monitor.
    Silent,
    /// A supervisor waits for a boot slot, for the delay of a restart, or for QEMU.
    Starting,
    /// The guest powered itself off, or a call or the host's shutdown ended it.
    Stopped,
    /// QEMU ended in another way.
    Crashed,
}

impl State {
    /// The state as a word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Silent => "silent",
            Self::Starting => "starting",
            Self::Stopped => "stopped",
            Self::Crashed => "crashed",
        }
    }
}

/// Returns the status of the VM. Its QEMU must answer until `deadline`; `run` is the run of its
/// record.
///
/// # Errors
/// If the locks or the exit record cannot be read. A QEMU that does not answer is
/// [`State::Silent`].
pub fn status(paths: &VmPaths, run: u64, deadline: Instant) -> Result<Status> {
    match power_state(paths)? {
        PowerState::On(qemu) => {
            let answer = Monitor::connect(&paths.qmp(), deadline)
                .and_then(|mut monitor| guest_state(&mut monitor));
            let (state, reason) =
                answer.unwrap_or_else(|error| (State::Silent, Some(error.to_string())));
            Ok(Status { state, reason, pid: Some(qemu.pid()) })
        }
        PowerState::Off => {
            let exit = ExitRecord::read(&paths.exit())?.filter(|exit| exit.run == run);
            let state = match exit.as_ref().map(ExitRecord::ending) {
                Some(Ending::PoweredOff | Ending::Stopped) => State::Stopped,
                Some(Ending::Crashed) | None
                    if pidlock::holder(&paths.supervisor_pid())?.is_some() =>
                {
                    State::Starting
                }
                Some(Ending::Crashed) | None => State::Crashed,
            };
            let reason = match exit {
                Some(exit) => Some(exit.describe()),
                None if state == State::Starting => None,
                None => Some("no supervisor recorded how it ended".to_owned()),
            };
            Ok(Status { state, reason, pid: None })
        }
    }
}

/// Returns the state of the guest, [`State::Running`] or [`State::Paused`], with the reason.
fn guest_state(monitor: &mut Monitor) -> Result<(State, Option<String>), MonitorError> {
    let status = monitor.execute(&QueryStatus {})?;
    if status.running {
        return Ok((State::Running, None));
    }
    let mut reason = printable(&status.state);
    if status.state == "io-error" {
        let devices = monitor.raw("query-block", &json!({}))?;
        let failed: Vec<_> =
            devices.as_array().into_iter().flatten().filter_map(failed_device).collect();
        reason = format!(
            "{reason} on {}",
            if failed.is_empty() { "a disk".to_owned() } else { failed.join(", ") }
        );
    }
    Ok((State::Paused, Some(reason)))
}

/// Returns the id and the error of `device`, an item of `query-block`; `None` if it has no error.
fn failed_device(device: &Value) -> Option<String> {
    let why = match device["io-status"].as_str()? {
        "nospace" => "no space",
        "failed" => "failed",
        _ => return None,
    };
    // The path is of the device itself, or of a child below it.
    let id =
        device["qdev"].as_str()?.trim_start_matches("/machine/peripheral/").split('/').next()?;
    Some(format!("{} ({why})", printable(id)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_device_names_the_id() {
        let qdev = "/machine/peripheral/disk-a/virtio-backend";
        let device = |status: &str| json!({"qdev": qdev, "io-status": status});
        assert_eq!(failed_device(&device("nospace")).as_deref(), Some("disk-a (no space)"));
        assert_eq!(failed_device(&device("ok")), None);
        assert_eq!(failed_device(&json!({"qdev": 7, "io-status": "failed"})), None);
    }
}
