//! Whether a VM is on, and how it is turned off. Used by calls; needs no supervisor.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::crash;
use crate::error::{Error, ErrorKind, Result};
use crate::qmp::monitor::Monitor;
use crate::qmp::power as qmp_power;
use crate::store::VmPaths;
use crate::sys::pidfd::Process;
use crate::sys::pidlock;

/// A QEMU that quits writes back what its images cache; more than this is a hung host.
const QUIT_TIMEOUT: Duration = Duration::from_secs(10);
/// A killed process is gone at once unless the kernel is stuck in its behalf.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// What a supervisor has left to do when its QEMU is gone: one record.
const SUPERVISOR_EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// Whether a VM is on.
#[derive(Debug)]
pub enum PowerState {
    /// Its QEMU lives: the kernel says so, by the lock on `qemu.pid`.
    On(Process),
    /// It does not.
    Off,
}

/// How much a guest is asked before its QEMU ends.
#[derive(Debug, Clone, Copy)]
pub enum StopMode {
    /// The power button, for this long; then as [`StopMode::Quit`].
    PowerButton(Duration),
    /// QEMU writes back its caches and ends.
    Quit,
    /// QEMU is killed. Only for a VM none of whose disks is kept.
    Kill,
}

/// Asks the kernel whether the VM's QEMU lives.
pub fn power_state(paths: &VmPaths) -> Result<PowerState> {
    Ok(pidlock::holder(&paths.qemu_pid())?.map_or(PowerState::Off, PowerState::On))
}

/// Turns the VM off and waits until its QEMU and its supervisor are gone. Gentle means that do not help are followed
/// by rougher ones; a QEMU that is stopped or hung is killed.
///
/// # Errors
/// [`ErrorKind::Timeout`] naming the process if even SIGKILL does not end it.
pub fn stop(paths: &VmPaths, mode: StopMode, deadline: Instant) -> Result<()> {
    end_qemu(paths, mode, deadline)?;
    let Some(supervisor) = pidlock::holder(&paths.supervisor_pid())? else { return Ok(()) };
    // Nobody wants the VM started again.
    supervisor.signal(Signal::SIGTERM)?;
    crash::point!("supervisor told to end");
    if !supervisor.wait_exit(capped(deadline, SUPERVISOR_EXIT_TIMEOUT))? {
        kill(&supervisor, "the supervisor", deadline)?;
    }
    // It may have been about to start QEMU when we first looked: its call was killed in the middle of a launch.
    end_qemu(paths, mode, deadline)
}

/// Has a launch that is under way end now instead of when it is done or at its deadline. For whoever is about to remove
/// the VM but finds its lock taken; a guest that runs already runs on.
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

/// The power button, again and again until the guest listens. Whether QEMU is gone.
fn press(paths: &VmPaths, qemu: &Process, timeout: Duration, deadline: Instant) -> bool {
    let until = capped(deadline, timeout);
    let pressed = Monitor::connect(&paths.qmp(), until).and_then(|mut monitor| {
        monitor.run(async |connection| qmp_power::press_button(connection, until).await)
    });
    if !matches!(pressed, Ok(qmp_power::Button::Down)) {
        tracing::info!(?pressed, "the guest did not follow the power button");
        return false;
    }
    qemu.wait_exit(capped(deadline, QUIT_TIMEOUT)).unwrap_or(false)
}

/// `quit`. Whether QEMU is gone.
fn quit(paths: &VmPaths, qemu: &Process, deadline: Instant) -> bool {
    let until = capped(deadline, QUIT_TIMEOUT);
    // A QEMU that was stopped answers nothing; half of the time is left for one that is only slow to write back.
    let greeting = capped(until, QUIT_TIMEOUT / 4);
    let told = Monitor::connect(&paths.qmp(), greeting)
        .and_then(|mut monitor| monitor.run(async |connection| qmp_power::quit(connection).await));
    if let Err(error) = told {
        tracing::info!(error = %error, "QEMU did not take `quit`");
        return false;
    }
    qemu.wait_exit(until).unwrap_or(false)
}

fn kill(process: &Process, what: &str, deadline: Instant) -> Result<()> {
    process.signal(Signal::SIGKILL)?;
    crash::point!("{what} told to die");
    if process
        .wait_exit(capped(deadline, KILL_TIMEOUT).max(Instant::now() + Duration::from_secs(1)))?
    {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Timeout, format!("{what}, process {}, does not end after SIGKILL", process.pid()))
        .hint("it hangs in the kernel, often on storage that went away: see /proc/<pid>/stack; then repeat the call"))
}

fn capped(deadline: Instant, timeout: Duration) -> Instant {
    deadline.min(Instant::now() + timeout)
}
