//! Whether a VM is on, for who must not be wrong about it.

use std::time::Instant;

use crate::cid::{Cid, VmCid};
use crate::cpi::Cpi;
use crate::cpi::disk::attach::DYING;
use crate::error::{Error, ErrorKind, Result};
use crate::host::cgroup::Cgroup;
use crate::store::VmPaths;
use crate::supervisor::{PowerState, power_state};
use crate::sys::pidfd::Process;
use crate::sys::pidlock;

impl Cpi {
    /// Whether the VM is on, for who does something with its disks. A file that is not there proves nothing: one counts as
    /// off only if none of its processes lives but a supervisor.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if that can not be told: its guest may have its disks.
    pub(in crate::cpi) fn power(&self, vm: &VmCid) -> Result<PowerState> {
        let paths = self.store.vm(vm);
        let state = power_state(&paths)?;
        if let PowerState::Off = state {
            is_all_off(vm, &paths)?;
        }
        Ok(state)
    }
}

/// Whether nothing of a VM whose `qemu.pid` nobody holds runs but its supervisor, as far as its control groups tell.
///
/// # Errors
/// [`ErrorKind::Conflict`] if somebody emptied the run directory under it: no pid file says any more that it is on.
pub(in crate::cpi) fn is_all_off(vm: &VmCid, paths: &VmPaths) -> Result<()> {
    let group = Cgroup::open(vm.as_str());
    let mut processes = group.processes()?;
    if processes.is_empty() {
        return Ok(());
    }
    // One that waits until it starts the VM again has no QEMU.
    let supervisor = pidlock::holder(&paths.supervisor_pid())?.map(|supervisor| supervisor.pid());
    processes.retain(|process| Some(process.pid()) != supervisor);
    // A process that dies lets go of its pid file a moment before it is gone.
    let until = Instant::now() + DYING;
    processes.retain(|process| !process.wait_exit(until).unwrap_or(false));
    if processes.is_empty() {
        return Ok(());
    }
    let message = format!(
        "VM '{vm}' has no pid file, but the processes {} in its control group",
        numbers(&processes)
    );
    Err(Error::new(ErrorKind::Conflict, message)
        .hint("its guest may run on; reboot_vm ends them and starts it anew"))
}

pub(in crate::cpi) fn numbers(processes: &[Process]) -> String {
    processes.iter().map(|process| process.pid().to_string()).collect::<Vec<_>>().join(", ")
}
