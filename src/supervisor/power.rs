//! The power state of a VM, and how a call turns the VM off. Works without a supervisor.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::crash;
use crate::error::{Error, ErrorKind, Result};
use crate::qmp::monitor::Monitor;
use crate::qmp::power as qmp_power;
use crate::store::VmPaths;
use crate::sys::pidfd::Process;
use crate::sys::pidlock;

/// How long QEMU may take to exit after `quit`, which writes back its image caches. A host that
/// needs longer is hung.
const QUIT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a process may take to exit after SIGKILL: it exits at once, unless it hangs in the
/// kernel.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a supervisor may take to exit once its QEMU has ended: it writes one record.
const SUPERVISOR_EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// Whether a VM is on.
#[derive(Debug)]
pub enum PowerState {
    /// QEMU runs: it holds the lock on `qemu.pid`.
    On(Process),
    /// No process holds that lock.
    Off,
}

/// How a VM is turned off.
#[derive(Debug, Clone, Copy)]
pub enum StopMode {
    /// Press the power button for up to this long, then do as [`StopMode::Quit`].
    PowerButton(Duration),
    /// Have QEMU write back its caches and exit.
    Quit,
    /// Kill QEMU, which loses cached writes. Only where no disk of the VM is kept, or its guest
    /// never ran.
    Kill,
}

/// Returns whether the VM's QEMU runs, by the kernel's lock on `qemu.pid`.
pub fn power_state(paths: &VmPaths) -> Result<PowerState> {
    Ok(pidlock::holder(&paths.qemu_pid())?.map_or(PowerState::Off, PowerState::On))
}

/// Turns the VM off and waits until its QEMU and its supervisor have ended. Each step that fails is
/// followed by a harder one: power button, `quit`, SIGKILL.
///
/// # Errors
/// [`ErrorKind::Timeout`] naming the process if even SIGKILL does not end it.
pub fn stop(paths: &VmPaths, mode: StopMode, deadline: Instant) -> Result<()> {
    end_qemu(paths, mode, deadline)?;
    let Some(supervisor) = pidlock::holder(&paths.supervisor_pid())? else { return Ok(()) };
    // The supervisor must not start the VM again.
    supervisor.signal(Signal::SIGTERM)?;
    crash::point!("supervisor terminated");
    if !supervisor.wait_exit(capped(deadline, SUPERVISOR_EXIT_TIMEOUT))? {
        kill(&supervisor, "the supervisor", deadline)?;
    }
    // If a call was killed during its launch, the supervisor may have started QEMU after the first
    // check.
    end_qemu(paths, mode, deadline)
}

/// Cancels a launch in progress. For a call that is to delete the VM but finds the VM's lock held.
/// A guest that already runs is not affected.
pub fn cancel_launch(paths: &VmPaths) -> Result<()> {
    pidlock::holder(&paths.supervisor_pid())?
        .map_or(Ok(()), |supervisor| supervisor.signal(Signal::SIGUSR1))
}

fn end_qemu(paths: &VmPaths, mode: StopMode, deadline: Instant) -> Result<()> {
    let PowerState::On(qemu) = power_state(paths)? else { return Ok(()) };
    let ended = match mode {
        StopMode::PowerButton(timeout) => {
            press(paths, &qemu, timeout, deadline) || quit(paths, &qemu, deadline)
        }
        StopMode::Quit => quit(paths, &qemu, deadline),
        StopMode::Kill => false,
    };
    if ended { Ok(()) } else { kill(&qemu, "QEMU", deadline) }
}

/// Presses the power button repeatedly until the guest shuts down, and returns whether QEMU has
/// exited.
fn press(paths: &VmPaths, qemu: &Process, timeout: Duration, deadline: Instant) -> bool {
    let until = capped(deadline, timeout);
    let pressed = Monitor::connect(&paths.qmp(), until).and_then(|mut monitor| {
        monitor.run(async |connection| qmp_power::press_button(connection, until).await)
    });
    if !matches!(pressed, Ok(qmp_power::Powerdown::Down)) {
        tracing::info!(?pressed, "the guest did not shut down after the power button");
        return false;
    }
    qemu.wait_exit(capped(deadline, QUIT_TIMEOUT)).unwrap_or(false)
}

/// Sends `quit` and returns whether QEMU has exited.
fn quit(paths: &VmPaths, qemu: &Process, deadline: Instant) -> bool {
    let until = capped(deadline, QUIT_TIMEOUT);
    // A QEMU stopped by SIGSTOP does not greet. Most of the time is for a QEMU that is slow to
    // write back.
    let greeting = capped(until, QUIT_TIMEOUT / 4);
    let sent = Monitor::connect(&paths.qmp(), greeting)
        .and_then(|mut monitor| monitor.run(async |connection| qmp_power::quit(connection).await));
    if let Err(error) = sent {
        tracing::info!(error = %error, "QEMU did not execute `quit`");
        return false;
    }
    qemu.wait_exit(until).unwrap_or(false)
}

fn kill(process: &Process, what: &str, deadline: Instant) -> Result<()> {
    process.signal(Signal::SIGKILL)?;
    crash::point!("{what} killed");
    if process
        .wait_exit(capped(deadline, KILL_TIMEOUT).max(Instant::now() + Duration::from_secs(1)))?
    {
        return Ok(());
    }
    let message = format!("{what}, process {pid}, does not end after SIGKILL", pid = process.pid());
    Err(Error::new(ErrorKind::Timeout, message).hint(format!(
        "it hangs in the kernel, often on storage that does not answer: \
         see '/proc/{}/stack', then repeat the call",
        process.pid()
    )))
}

/// Returns `deadline`, or the time `timeout` from now if that is earlier.
fn capped(deadline: Instant, timeout: Duration) -> Instant {
    deadline.min(Instant::now() + timeout)
}
