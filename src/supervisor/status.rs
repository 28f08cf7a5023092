//! What a VM is doing, asked of the kernel, its QEMU and its exit record; for people, who are told what is known.

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

/// What a VM is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// In one word.
    pub state: State,
    /// Why, where there is more to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its QEMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
}

/// The word for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Its vCPUs run.
    Running,
    /// Its QEMU is up, its vCPUs do not run. The reason is QEMU's RunState and, after an I/O error, the disk.
    Paused,
    /// Its QEMU is up and does not say what it does: it hangs, or another client has the monitor.
    Silent,
    /// It is about to start: it waits for its turn, for the time of a restart, or for its QEMU.
    Starting,
    /// The guest powered itself off, or the host ended it on purpose.
    Stopped,
    /// It ended otherwise.
    Crashed,
}

impl State {
    /// The word.
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

/// What the VM is doing, asking its QEMU until `deadline`. `run` is its record's.
///
/// # Errors
/// Only where the host itself can not be asked: a QEMU that does not answer is [`State::Silent`].
pub fn status(paths: &VmPaths, run: u64, deadline: Instant) -> Result<Status> {
    match power_state(paths)? {
        PowerState::On(qemu) => {
            let asked = Monitor::connect(&paths.qmp(), deadline)
                .and_then(|mut monitor| guest_state(&mut monitor));
            let (state, reason) =
                asked.unwrap_or_else(|error| (State::Silent, Some(error.to_string())));
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
                None => Some("nobody saw how it ended".to_owned()),
            };
            Ok(Status { state, reason, pid: None })
        }
    }
}

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

/// The disk that `device`, of `query-block`, is and what is wrong with it, if something is.
fn failed_device(device: &Value) -> Option<String> {
    let why = match device["io-status"].as_str()? {
        "nospace" => "no space",
        "failed" => "failed",
        _ => return None,
    };
    // A device's own id, or a child's below it.
    let id =
        device["qdev"].as_str()?.trim_start_matches("/machine/peripheral/").split('/').next()?;
    Some(format!("{} ({why})", printable(id)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_device_is_named_by_its_id() {
        let device = |status: &str| json!({"qdev": "/machine/peripheral/disk-a/virtio-backend", "io-status": status});
        assert_eq!(failed_device(&device("nospace")).as_deref(), Some("disk-a (no space)"));
        assert_eq!(failed_device(&device("ok")), None);
        assert_eq!(failed_device(&json!({"qdev": 7, "io-status": "failed"})), None);
    }
}
