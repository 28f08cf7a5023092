//! Starting a VM's supervisor from a call.

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

use super::power::{PowerState, StopMode, power_state, stop};
use super::{StartMode, StartResult, VmContext};
use crate::cid::Cid;
use crate::error::{Error, ErrorKind, Result};
use crate::host::{detached, io_uring};
use crate::qmp::monitor::Monitor;
use crate::qmp::query::QueryStatus;
use crate::store::{Guard, VmPaths};
use crate::sys::pidlock;

/// What a launch takes on a busy host.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(30);
/// What is kept of a deadline for ending a launch that failed.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(10);
/// A QEMU that is well answers at once.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);

/// Starts the supervisor of the VM and waits until its guest runs. `lock` is the VM's.
///
/// # Errors
/// Why the launch failed; nothing of it is left, taps, sockets and processes included.
pub fn start(
    context: &VmContext,
    config_file: Option<&Path>,
    lock: &Guard,
    deadline: Instant,
) -> Result<()> {
    io_uring::probe(context.store.run_dir(), &context.config.qemu, deadline);
    VmContext::rotate(&context.paths.supervisor_log());
    let begin = StartMode::Launch { queue_deadline: queue_deadline_before(deadline) };
    let launched = spawn(context, begin, config_file, lock, deadline);
    if launched.is_err() {
        // A launch that failed cleaned up; one that hangs or was killed did not. Its guest may have begun to write.
        stop(&context.paths, StopMode::Quit, deadline.max(Instant::now() + CLEANUP_TIMEOUT))?;
    }
    launched
}

/// What was done for a VM that may have lost its supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adoption {
    /// Nothing: it has one, or is off.
    NotNeeded,
    /// Its QEMU has a new one.
    Adopted,
    /// Its guest had never run, and was started.
    Launched,
}

/// Gives a VM that is on and has no supervisor one that takes its QEMU over. `lock` is the VM's.
///
/// # Errors
/// Why that failed; the VM runs on as it did.
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
        tracing::warn!(vm = %context.cid, "its launch was cut short and begins again");
        stop(&context.paths, StopMode::Kill, deadline)?;
        return start(context, config_file, lock, deadline).map(|()| Adoption::Launched);
    }
    spawn(context, StartMode::Adopt, config_file, lock, deadline).map(|()| Adoption::Adopted)
}

/// Whether the VM's QEMU waits for a `cont` that nobody will give it, because its supervisor died in the middle of the
/// launch. What else the launch had still to do is not known. One that does not answer did run.
fn is_in_prelaunch(paths: &VmPaths, deadline: Instant) -> bool {
    let until = deadline.min(Instant::now() + STATUS_TIMEOUT);
    let status = Monitor::connect(&paths.qmp(), until)
        .and_then(|mut monitor| monitor.execute(&QueryStatus {}));
    status.is_ok_and(|status| status.is_prelaunch())
}

fn spawn(
    context: &VmContext,
    begin: StartMode,
    config_file: Option<&Path>,
    lock: &Guard,
    deadline: Instant,
) -> Result<()> {
    let mut arguments: Vec<OsString> = vec!["supervise".into(), context.cid.as_str().into()];
    match begin {
        StartMode::Adopt => arguments.push("--adopt".into()),
        StartMode::Launch { queue_deadline } => {
            let timeout = queue_deadline.saturating_duration_since(Instant::now()).as_millis();
            arguments.extend(["--queue-timeout-ms".into(), timeout.to_string().into()]);
        }
    }
    if let Some(file) = config_file {
        arguments.extend(["--config".into(), file.as_os_str().to_owned()]);
    }
    lock.share()
        .and_then(|lock| detached::spawn(&arguments, lock, &context.paths.supervisor_log()))
        .and_then(|handshake| handshake.read_line(deadline))
        .and_then(|line| parse_result(context, line.as_deref()))
}

/// How long a launch may wait for its turn: there must be time left to launch, or to say that it did not come to that.
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
                "the supervisor ended before the VM ran: {}",
                crate::host::tail::last_lines(&log, 3)
            ),
        )
        .hint(format!("its log is '{}'", log.display()))),
    }
}
