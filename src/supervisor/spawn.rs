//! Starting a VM's supervisor from a call.

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

use super::power::{Button, PowerState, power_state, stop};
use super::{Begin, Launched, Scope};
use crate::cid::Cid;
use crate::error::{Error, ErrorKind, Result};
use crate::host::{detached, io_uring};
use crate::qmp::monitor::Monitor;
use crate::qmp::query::QueryStatus;
use crate::store::{Guard, VmPaths};
use crate::sys::pidlock;

/// What a launch takes on a busy host.
const LAUNCH: Duration = Duration::from_secs(30);
/// What is kept of a deadline for ending a launch that failed.
const CLEANING_UP: Duration = Duration::from_secs(10);
/// A QEMU that is well answers at once.
const ASKED: Duration = Duration::from_secs(2);

/// Starts the supervisor of the VM and waits until its guest runs. `lock` is the VM's.
///
/// # Errors
/// Why the launch failed; nothing of it is left, taps, sockets and processes included.
pub fn start(
    scope: &Scope,
    config_file: Option<&Path>,
    lock: &Guard,
    deadline: Instant,
) -> Result<()> {
    io_uring::probe(scope.store.run_dir(), &scope.config.qemu, deadline);
    Scope::rotate(&scope.paths.supervisor_log());
    let begin = Begin::Launch { queue_until: queue_until(deadline) };
    let launched = spawn(scope, begin, config_file, lock, deadline);
    if launched.is_err() {
        // A launch that failed cleaned up; one that hangs or was killed did not. Its guest may have begun to write.
        stop(&scope.paths, Button::Quit, deadline.max(Instant::now() + CLEANING_UP))?;
    }
    launched
}

/// What was done for a VM that may have lost its supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adoption {
    /// Nothing: it has one, or is off.
    Needless,
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
    scope: &Scope,
    config_file: Option<&Path>,
    lock: &Guard,
    deadline: Instant,
) -> Result<Adoption> {
    let is_on = matches!(power_state(&scope.paths)?, PowerState::On(_));
    if !is_on || pidlock::holder(&scope.paths.supervisor_pid())?.is_some() {
        return Ok(Adoption::Needless);
    }
    if never_ran(&scope.paths, deadline) {
        tracing::warn!(vm = %scope.cid, "its launch was cut short and begins again");
        stop(&scope.paths, Button::Kill, deadline)?;
        return start(scope, config_file, lock, deadline).map(|()| Adoption::Launched);
    }
    spawn(scope, Begin::Adopt, config_file, lock, deadline).map(|()| Adoption::Adopted)
}

/// Whether the VM's QEMU waits for a `cont` that nobody will give it, because its supervisor died in the middle of the
/// launch. What else the launch had still to do is not known. One that does not answer did run.
fn never_ran(paths: &VmPaths, deadline: Instant) -> bool {
    let until = deadline.min(Instant::now() + ASKED);
    let status = Monitor::connect(&paths.qmp(), until)
        .and_then(|mut monitor| monitor.execute(&QueryStatus {}));
    status.is_ok_and(|status| status.is_prelaunch())
}

fn spawn(
    scope: &Scope,
    begin: Begin,
    config_file: Option<&Path>,
    lock: &Guard,
    deadline: Instant,
) -> Result<()> {
    let mut arguments: Vec<OsString> = vec!["supervise".into(), scope.cid.as_str().into()];
    match begin {
        Begin::Adopt => arguments.push("--adopt".into()),
        Begin::Launch { queue_until } => {
            let patience = queue_until.saturating_duration_since(Instant::now()).as_millis();
            arguments.extend(["--queue-timeout".into(), patience.to_string().into()]);
        }
    }
    if let Some(file) = config_file {
        arguments.extend(["--config".into(), file.as_os_str().to_owned()]);
    }
    lock.share()
        .and_then(|lock| detached::spawn(&arguments, lock, &scope.paths.supervisor_log()))
        .and_then(|handshake| handshake.line(deadline))
        .and_then(|line| understand(scope, line.as_deref()))
}

/// How long a launch may wait for its turn: there must be time left to launch, or to say that it did not come to that.
fn queue_until(deadline: Instant) -> Instant {
    let left = deadline.saturating_duration_since(Instant::now());
    Instant::now() + left.saturating_sub(LAUNCH).max(left / 2)
}

fn understand(scope: &Scope, line: Option<&str>) -> Result<()> {
    let log = scope.paths.supervisor_log();
    match line.map(serde_json::from_str::<Launched>) {
        Some(Ok(Launched::Running)) => Ok(()),
        Some(Ok(Launched::Failed { kind, report })) => Err(Error::new(kind, report)),
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
