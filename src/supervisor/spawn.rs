//! Starting a VM's supervisor from a call.

use std::path::Path;
use std::time::Instant;

use super::power::{Button, stop};
use super::{Launched, Scope};
use crate::cid::Cid;
use crate::error::{Error, ErrorKind, Result};
use crate::host::{detached, io_uring};
use crate::store::Guard;

/// Starts the supervisor of the VM and waits until its guest runs. `lock` is the VM's.
///
/// # Errors
/// Why the launch failed; nothing of it is left, taps, sockets and processes included.
pub fn start(scope: &Scope, config_file: Option<&Path>, lock: &Guard, deadline: Instant) -> Result<()> {
    let mut arguments = vec!["supervise".into(), scope.cid.as_str().into()];
    if let Some(file) = config_file {
        arguments.extend(["--config".into(), file.as_os_str().to_owned()]);
    }
    io_uring::probe(scope.store.run_dir(), &scope.config.qemu, deadline);
    Scope::rotate(&scope.paths.supervisor_log());
    let launched = lock
        .share()
        .and_then(|lock| detached::spawn(&arguments, lock, &scope.paths.supervisor_log()))
        .and_then(|handshake| handshake.line(deadline))
        .and_then(|line| understand(scope, line.as_deref()));
    if launched.is_err() {
        // A launch that failed cleaned up; one that hangs or was killed did not.
        stop(&scope.paths, Button::Kill, deadline)?;
    }
    launched
}

fn understand(scope: &Scope, line: Option<&str>) -> Result<()> {
    let log = scope.paths.supervisor_log();
    match line.map(serde_json::from_str::<Launched>) {
        Some(Ok(Launched::Running)) => Ok(()),
        Some(Ok(Launched::Failed { kind, report })) => Err(Error::new(kind, report)),
        Some(Err(_)) | None => Err(Error::new(
            ErrorKind::Host,
            format!("the supervisor ended before the VM ran: {}", crate::host::tail::last_lines(&log, 3)),
        )
        .hint(format!("its log is '{}'", log.display()))),
    }
}
