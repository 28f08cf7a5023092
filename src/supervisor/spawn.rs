//! How a call starts a VM's supervisor.

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

use super::power::{PowerState, StopMode, power_state, stop};
use super::{StartMode, StartResult, VmContext, capped_log};
use crate::cid::Cid;
use crate::error::{Error, ErrorKind, Result};
use crate::host::{detached, io_uring};
use crate::qmp::monitor::Monitor;
use crate::qmp::query::QueryStatus;
use crate::store::{Guard, VmPaths};
use crate::sys::pidlock;

/// How long a launch takes on a busy host, not counting the wait for a boot slot.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(30);
/// How long to end a failed launch, even after the call's deadline.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(10);
/// How long to wait for `query-status`: a healthy QEMU answers at once.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);

/// Starts the supervisor of the VM and waits until its guest runs. `lock` is the VM's lock.
///
/// # Errors
/// Why the launch failed. No process, tap or socket of it remains.
pub fn start(
    context: &VmContext,
    config_file: Option<&Path>,
    lock: &Guard,
    deadline: Instant,
) -> Result<()> {
    io_uring::probe(context.store.run_dir(), &context.config.qemu, deadline);
    capped_log::rotate(&context.paths.supervisor_log());
    let mode = StartMode::Launch { queue_deadline: queue_deadline_before(deadline) };
    let launched = spawn(context, mode, config_file, lock, deadline);
    if launched.is_err() {
        // A failed launch has cleaned up, but one that hangs or was killed has not. Its guest may
        // have written to a disk, so QEMU quits instead of being killed.
        stop(&context.paths, StopMode::Quit, deadline.max(Instant::now() + CLEANUP_TIMEOUT))?;
    }
    launched
}

/// What [`adopt`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adoption {
    /// Nothing: the VM has a supervisor, or is off.
    NotNeeded,
    /// A new supervisor watches the running QEMU.
    Adopted,
    /// The VM was launched again: its guest had never run.
    Launched,
}

/// Starts a supervisor that adopts the VM's QEMU, if the VM is on and has none. `lock` is the VM's
/// lock.
///
/// # Errors
/// Why the adoption failed. The VM keeps running without a supervisor.
pub fn adopt(
    context: &VmContext,
    config_file: Option<&Path>,
    lock: &Guard,
    deadline: Instant,
) -> Result<Adoption> {
    let is_on = matches!(power_state(&context.paths)?, PowerState::On(_));
    if !is_on || pidlock::holder(&context.paths.supervisor_pid())?.is_some() {
        return Ok(Adoption::NotNeeded);
    }
    if is_in_prelaunch(&context.paths, deadline) {
        tracing::warn!(vm = %context.cid, "the VM's launch was interrupted: launching it again");
        stop(&context.paths, StopMode::Kill, deadline)?;
        return start(context, config_file, lock, deadline).map(|()| Adoption::Launched);
    }
    spawn(context, StartMode::Adopt, config_file, lock, deadline).map(|()| Adoption::Adopted)
}

/// Returns whether QEMU still waits for its first `cont` because the supervisor died during the
/// launch. Which other steps of the launch are missing is unknown. A QEMU that does not answer
/// counts as one whose guest has run.
fn is_in_prelaunch(paths: &VmPaths, deadline: Instant) -> bool {
    let until = deadline.min(Instant::now() + STATUS_TIMEOUT);
    let status = Monitor::connect(&paths.qmp(), until)
        .and_then(|mut monitor| monitor.execute(&QueryStatus {}));
    status.is_ok_and(|status| status.is_prelaunch())
}

fn spawn(
    context: &VmContext,
    mode: StartMode,
    config_file: Option<&Path>,
    lock: &Guard,
    deadline: Instant,
) -> Result<()> {
    let mut arguments: Vec<OsString> = vec!["supervise".into(), context.cid.as_str().into()];
    match mode {
        StartMode::Adopt => arguments.push("--adopt".into()),
        StartMode::Launch { queue_deadline } => {
            let timeout = queue_deadline.saturating_duration_since(Instant::now()).as_millis();
            arguments.extend(["--queue-timeout".into(), timeout.to_string().into()]);
        }
    }
    if mode == StartMode::Adopt {
        capped_log::rotate_full_supervisor_log(&context.paths);
    }
    if let Some(file) = config_file {
        arguments.extend(["--config".into(), file.as_os_str().to_owned()]);
    }
    lock.share()
        .and_then(|lock| detached::spawn(&arguments, lock, &context.paths.supervisor_log()))
        .and_then(|handshake| handshake.read_line(deadline))
        .and_then(|line| parse_result(context, line.as_deref()))
}

/// Returns when a launch must stop waiting for a boot slot, so that before `deadline` it can still
/// launch, or report the timeout.
fn queue_deadline_before(deadline: Instant) -> Instant {
    let left = deadline.saturating_duration_since(Instant::now());
    Instant::now() + left.saturating_sub(LAUNCH_TIMEOUT).max(left / 2)
}

fn parse_result(context: &VmContext, line: Option<&str>) -> Result<()> {
    let log = context.paths.supervisor_log();
    match line.map(serde_json::from_str::<StartResult>) {
        Some(Ok(StartResult::Running)) => Ok(()),
        Some(Ok(StartResult::Failed { kind, report })) => Err(Error::new(kind, report)),
        Some(Err(_)) | None => Err(Error::new(
            ErrorKind::Host,
            format!(
                "the supervisor of VM '{}' ended before the guest ran: {}",
                context.cid,
                crate::host::tail::last_lines(&log, 3)
            ),
        )
        .hint(format!("see its log '{}'", log.display()))),
    }
}
