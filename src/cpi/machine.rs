//! A VM as its disks need it: its record, its lock, whether it is on, and the monitor of its QEMU.

use std::time::{Duration, Instant};

use crate::cid::{Cid, DiskCid, VmCid};
use crate::cpi::context::Context;
use crate::cpi::creation::acknowledgement;
use crate::error::{Error, ErrorKind, Result};
use crate::host::cgroup::Cgroup;
use crate::qmp::hotplug::Inventory;
use crate::qmp::monitor::Monitor;
use crate::store::{Guard, Rank, VmPaths, VmRecord};
use crate::supervisor::{self, PowerState, power_state};
use crate::sys::pidfd::Process;
use crate::sys::pidlock;

/// How long a QEMU that has closed its monitor takes to exit: it frees memory and taps in between.
const QEMU_EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// The record of a VM that is ready, on or off.
///
/// # Errors
/// [`ErrorKind::VmNotFound`].
pub(super) fn find(cx: &Context, cid: &VmCid) -> Result<VmRecord> {
    cx.ready::<VmRecord>(cid)?
        .ok_or_else(|| Error::new(ErrorKind::VmNotFound, format!("there is no VM '{cid}'")))
}

/// Takes the lock of a VM that is ready. A running VM without a supervisor gets one.
///
/// # Errors
/// [`ErrorKind::VmNotFound`], also if the VM was deleted while this call waited.
pub(crate) fn lock(cx: &Context, cid: &VmCid, deadline: Instant) -> Result<(Guard, VmRecord)> {
    find(cx, cid)?;
    let lock = cx.store.lock(Rank::Vm, cid, deadline)?;
    let vm = match find(cx, cid) {
        Ok(vm) => vm,
        Err(error) => return lock.unlink().and(Err(error)),
    };
    acknowledgement::acknowledge::<VmRecord>(cx, cid);
    if let Err(error) = supervisor::adopt(&cx.vm_context(cid), cx.config_file(), &lock, deadline) {
        tracing::warn!(vm = %cid, error = error.report(), "cannot start a supervisor for the VM");
    }
    Ok((lock, vm))
}

/// The lock and the monitor of a VM, if it is ready and on.
pub(super) fn lock_running(
    cx: &Context,
    cid: &VmCid,
    deadline: Instant,
) -> Result<Option<(Guard, Monitor)>> {
    match lock(cx, cid, deadline) {
        Ok((lock, vm)) => Ok(monitor(cx, &vm, deadline)?.map(|monitor| (lock, monitor))),
        Err(error) if error.kind() == ErrorKind::VmNotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the VM is on, for a call that changes its disks. A missing pid file proves nothing: a VM
/// counts as off only if none of its processes runs but the supervisor.
///
/// # Errors
/// As [`ensure_off`].
pub(super) fn power(cx: &Context, vm: &VmCid) -> Result<PowerState> {
    let paths = cx.store.vm(vm);
    let state = power_state(&paths)?;
    if let PowerState::Off = state {
        ensure_off(vm, &paths)?;
    }
    Ok(state)
}

/// Ensures that a VM whose `qemu.pid` is not locked has no process in its control group but the
/// supervisor.
///
/// # Errors
/// [`ErrorKind::Conflict`] if there is one: the run directory was emptied while the VM was on, and
/// the guest may use its disks.
pub(crate) fn ensure_off(vm: &VmCid, paths: &VmPaths) -> Result<()> {
    let group = Cgroup::open(vm.as_str());
    let mut processes = group.processes()?;
    if processes.is_empty() {
        return Ok(());
    }
    // A supervisor that waits before it restarts the VM has no QEMU.
    let supervisor = pidlock::holder(&paths.supervisor_pid())?.map(|supervisor| supervisor.pid());
    processes.retain(|process| Some(process.pid()) != supervisor);
    // A QEMU that exits releases its pid file a moment before it is gone.
    let until = Instant::now() + QEMU_EXIT_TIMEOUT;
    processes.retain(|process| !process.wait_exit(until).unwrap_or(false));
    if processes.is_empty() {
        return Ok(());
    }
    let pids = pids(&processes);
    let message = format!("VM '{vm}' has no pid file, but processes in its control group: {pids}");
    Err(Error::new(ErrorKind::Conflict, message)
        .hint("its guest may be running; reboot_vm ends these processes and starts the VM"))
}

/// The pids of processes, for a message.
pub(crate) fn pids(processes: &[Process]) -> String {
    processes.iter().map(|process| process.pid().to_string()).collect::<Vec<_>>().join(", ")
}

/// The VM's monitor; `None` if the VM is off: its next start plugs in what the record lists.
pub(super) fn monitor(cx: &Context, vm: &VmRecord, deadline: Instant) -> Result<Option<Monitor>> {
    match power(cx, &vm.cid)? {
        PowerState::Off => Ok(None),
        PowerState::On(_) => Ok(Some(Monitor::connect(&cx.store.vm(&vm.cid).qmp(), deadline)?)),
    }
}

/// Runs `act` on the monitor of a VM that is on. A VM that is off, or whose QEMU exits meanwhile,
/// has no device and no image open: its next start follows the record, and waits for the VM's lock,
/// which the caller holds.
pub(super) fn with_monitor(
    cx: &Context,
    vm: &VmRecord,
    deadline: Instant,
    act: impl FnOnce(&mut Monitor) -> Result<()>,
) -> Result<()> {
    let PowerState::On(qemu) = power(cx, &vm.cid)? else { return Ok(()) };
    let qmp = cx.store.vm(&vm.cid).qmp();
    let acted = Monitor::connect(&qmp, deadline).map_err(Error::from).and_then(|mut m| act(&mut m));
    match acted {
        // A QEMU that exits closes its monitor first.
        Err(error)
            if error.kind() == ErrorKind::Host
                && qemu.wait_exit(Instant::now() + QEMU_EXIT_TIMEOUT)? =>
        {
            tracing::info!(error = error.report(), "QEMU exited meanwhile");
            Ok(())
        }
        acted => acted,
    }
}

/// Whether the VM's QEMU has a device for the disk, whatever the record says.
pub(super) fn has_device(
    cx: &Context,
    vm: &VmRecord,
    disk: &DiskCid,
    deadline: Instant,
) -> Result<bool> {
    match monitor(cx, vm, deadline)? {
        Some(mut monitor) => Ok(Inventory::query(&mut monitor)?.has_device(disk.as_str())),
        None => Ok(false),
    }
}

/// Adds to the error of a job in QEMU that the VM has ended, if it has: that says more than the
/// error of its monitor.
pub(super) fn explain_exit(cx: &Context, vm: &VmCid, error: Error) -> Error {
    let has_exited = match power_state(&cx.store.vm(vm)) {
        Ok(PowerState::On(qemu)) if error.kind() == ErrorKind::Host => {
            qemu.wait_exit(Instant::now() + QEMU_EXIT_TIMEOUT)
        }
        state => Ok(matches!(state, Ok(PowerState::Off))),
    };
    match has_exited {
        Ok(true) => error.during(format!("VM '{vm}' ended while its disk was copied")),
        _ => error,
    }
}
