//! Block jobs: copying a disk while the guest uses it.
//!
//! ```text
//!   blockdev-backup   created ─► running ─────────────────────────────► concluded ─► dismissed
//!                                   │                                       ▲
//!   blockdev-mirror   created ─► running ─► ready ─► (job-complete) ─► pending ─► (job-finalize)
//!                                             │ follows the guest's    │ the disk's I/O waits:
//!                                             │ writes                 │ images equal and flushed
//!                                             ▼                        ▼ until one is chosen
//!                            job-cancel, at any time: concluded, with no effect on the disk
//! ```
//!
//! A job outlives the client that started it, and QEMU serves one client at a time. So a client
//! waits for a job in turns: it queries the job, waits for events, and closes the connection to let
//! other clients in. The next turn's query shows what happened between two turns. A job is
//! identified by its id, by which any client can [cancel](cancel_all) it.

use std::time::{Duration, Instant};

use qapi::qmp;

use super::error::MonitorError;
use super::event::Event;
use super::monitor::Monitor;
use super::query::{Job, QueryJobs};
use super::wire::printable;
use crate::error::{Error, ErrorKind};

/// Longest time that one turn of waiting keeps other clients from the monitor. They time out after
/// five seconds.
pub const MONITOR_TURN_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest time between two queries of a job that is being cancelled. An event usually ends the
/// wait sooner.
const JOB_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Why a job did not reach the wanted state.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// QEMU has no such job: another client cancelled it, or QEMU was restarted.
    #[error("qemu has no job '{id}': it was cancelled, or QEMU was restarted")]
    NotFound {
        /// The job's id.
        id: String,
    },
    /// The job failed. Its target is incomplete.
    #[error("job '{id}' failed: {why}")]
    Failed {
        /// The job's id.
        id: String,
        /// QEMU's text, truncated and escaped.
        why: String,
    },
    /// The job has not reached the state by the deadline.
    #[error("job '{id}' is still {status} at its deadline")]
    Timeout {
        /// The job's id.
        id: String,
        /// The job's state, QEMU's JobStatus.
        status: String,
    },
    /// The monitor failed.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
}

impl From<JobError> for Error {
    fn from(error: JobError) -> Self {
        let kind = match error {
            JobError::Monitor(error) => return error.into(),
            // QEMU reports strerror's text and no error code.
            JobError::Failed { ref why, .. } if why.contains("No space left") => {
                ErrorKind::NoDiskSpace
            }
            JobError::Failed { .. } | JobError::NotFound { .. } => ErrorKind::Host,
            JobError::Timeout { .. } => ErrorKind::Timeout,
        };
        Error::new(kind, error.to_string())
    }
}

/// Waits in turns until the job `id` is in the state `wanted`. After each turn `progress` receives
/// the work done and the work in total. Returns the connection of the last turn.
///
/// # Errors
/// See [`JobError`].
pub fn wait_in_turns(
    connect: &dyn Fn() -> Result<Monitor, MonitorError>,
    id: &str,
    wanted: &str,
    deadline: Instant,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Monitor, JobError> {
    loop {
        let mut monitor = match connect() {
            // Another client is taking a long turn.
            Err(MonitorError::Greeting { .. }) if Instant::now() < deadline => continue,
            connected => connected?,
        };
        match wait(&mut monitor, id, wanted, deadline.min(Instant::now() + MONITOR_TURN_TIMEOUT)) {
            Ok(()) => return Ok(monitor),
            Err(JobError::Timeout { .. }) if Instant::now() < deadline => {}
            Err(error) => return Err(error),
        }
        if let Some(job) = find(&mut monitor, id)? {
            progress(job.current_progress, job.total_progress);
        }
    }
}

/// Waits until the job `id` is in the state `wanted`. A job that concludes before has failed.
///
/// # Errors
/// See [`JobError`].
pub fn wait(monitor: &mut Monitor, id: &str, wanted: &str, until: Instant) -> Result<(), JobError> {
    loop {
        let job = find(monitor, id)?.ok_or_else(|| JobError::NotFound { id: id.to_owned() })?;
        match (job.status.as_str(), job.error) {
            (_, Some(error)) => {
                return Err(JobError::Failed { id: id.to_owned(), why: printable(&error) });
            }
            (status, None) if status == wanted => return Ok(()),
            ("concluded" | "aborting", None) => {
                let why = "it was cancelled".into();
                return Err(JobError::Failed { id: id.to_owned(), why });
            }
            (status, None) if Instant::now() >= until => {
                return Err(JobError::Timeout { id: id.to_owned(), status: printable(status) });
            }
            _ => {}
        }
        monitor.wait_event(|event| is_of_job(event, id), until)?;
    }
}

/// Returns the job `id` if QEMU has it.
///
/// # Errors
/// Those of [`Monitor::execute`].
pub fn find(monitor: &mut Monitor, id: &str) -> Result<Option<Job>, MonitorError> {
    Ok(monitor.execute(&QueryJobs {})?.into_iter().find(|job| job.id == id))
}

/// Dismisses the concluded job `id`: QEMU forgets it.
///
/// # Errors
/// Those of [`Monitor::execute`].
pub fn dismiss(monitor: &mut Monitor, id: &str) -> Result<(), MonitorError> {
    monitor.execute(&qmp::job_dismiss { id: id.to_owned() }).map(drop)
}

/// Cancels and dismisses every job whose id `is_own` accepts, whatever its state. Returns those
/// that remain at `until`.
///
/// # Errors
/// Those of [`Monitor::execute`].
pub fn cancel_all(
    monitor: &mut Monitor,
    is_own: impl Fn(&str) -> bool,
    until: Instant,
) -> Result<Vec<Job>, MonitorError> {
    loop {
        let mut own = monitor.execute(&QueryJobs {})?;
        own.retain(|job| is_own(&job.id));
        if own.is_empty() || Instant::now() >= until {
            return Ok(own);
        }
        for Job { id, status, .. } in own {
            let step = match status.as_str() {
                "concluded" => monitor.execute(&qmp::job_dismiss { id }),
                _ => monitor.execute(&qmp::job_cancel { id }),
            };
            match step {
                // A refusal means that the job has changed its state since the query.
                Ok(_) | Err(MonitorError::Refused { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        monitor.wait_event(
            |event| event.name == JOB_STATUS_CHANGE,
            until.min(Instant::now() + JOB_POLL_INTERVAL),
        )?;
    }
}

const JOB_STATUS_CHANGE: &str = "JOB_STATUS_CHANGE";

fn is_of_job(event: &Event, id: &str) -> bool {
    event.name == JOB_STATUS_CHANGE && event.data["id"] == id
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::qmp::testing::{Guest, Image, test_deadline};

    /// Starts a job that is `ready` soon and runs until it is cancelled.
    fn mirror(monitor: &mut Monitor, id: &str) {
        for name in ["source", "target"] {
            let node =
                json!({"driver": "null-co", "node-name": format!("{name}-{id}"), "size": 1 << 20});
            monitor.raw("blockdev-add", &node).unwrap();
        }
        let copy = json!({"job-id": id, "device": format!("source-{id}"),
            "target": format!("target-{id}"), "sync": "full",
            "auto-dismiss": false, "auto-finalize": false});
        monitor.raw("blockdev-mirror", &copy).unwrap();
    }

    #[test]
    fn wait_in_turns_lets_other_clients_use_the_monitor() {
        let guest = Guest::booted(Image::Answering, 0);
        mirror(&mut guest.monitor(), "copy");
        let connect = || Monitor::connect(&guest.socket(), test_deadline());
        drop(wait_in_turns(&connect, "copy", "ready", test_deadline(), &mut |_, _| ()).unwrap());
        // The job does not conclude by itself. Each turn lets the other client in.
        let mut turns = 0;
        let mut monitor = std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                std::thread::yield_now();
                let mut monitor = connect().unwrap();
                monitor.raw("job-complete", &json!({"id": "copy"})).unwrap();
            });
            let monitor =
                wait_in_turns(&connect, "copy", "pending", test_deadline(), &mut |_, _| turns += 1)
                    .unwrap();
            other.join().unwrap();
            monitor
        });
        assert!(turns < 20, "{turns}");
        monitor.raw("job-finalize", &json!({"id": "copy"})).unwrap();
        wait(&mut monitor, "copy", "concluded", test_deadline()).unwrap();
        dismiss(&mut monitor, "copy").unwrap();
        let dismissed = wait(&mut monitor, "copy", "concluded", test_deadline()).unwrap_err();
        assert!(matches!(dismissed, JobError::NotFound { .. }), "{dismissed}");
    }

    #[test]
    fn job_that_is_slow_cancelled_or_full_is_an_error() {
        let guest = Guest::booted(Image::Answering, 0);
        let mut monitor = guest.monitor();
        mirror(&mut monitor, "disk.one");
        mirror(&mut monitor, "other");
        let late =
            wait(&mut monitor, "disk.one", "concluded", Instant::now() + Duration::from_millis(50))
                .unwrap_err();
        assert!(matches!(late, JobError::Timeout { .. }), "{late}");
        monitor.execute(&qmp::job_cancel { id: "disk.one".into() }).unwrap();
        let ended = wait(&mut monitor, "disk.one", "pending", test_deadline()).unwrap_err();
        assert!(matches!(ended, JobError::Failed { .. }), "{ended}");
        let left = cancel_all(&mut monitor, |id| id.starts_with("disk."), test_deadline()).unwrap();
        assert!(left.is_empty());
        assert!(find(&mut monitor, "other").unwrap().is_some(), "other jobs are not cancelled");
        let full = JobError::Failed { id: "x".into(), why: "No space left on device".into() };
        assert_eq!(Error::from(full).kind(), ErrorKind::NoDiskSpace);
    }
}
