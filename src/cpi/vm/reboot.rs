//! reboot_vm.

use std::time::{Duration, Instant};

use crate::cid::{Cid, VmCid};
use crate::cpi::context::Context;
use crate::cpi::machine;
use crate::error::Result;
use crate::host::cgroup::Cgroup;
use crate::image::import::read_by_deadline;
use crate::store::record::Desired;
use crate::supervisor::{self, StopMode};

/// How long a guest may take to follow the power button. systemd waits 90 s for a unit; a stemcell
/// needs 5 to 7 s once the Director has stopped its jobs.
const POWER_BUTTON_TIMEOUT: Duration = Duration::from_secs(120);

/// Restarts the VM if it is on, starts it if it is off.
pub(in crate::cpi) fn reboot(cx: &Context, cid: &VmCid) -> Result<()> {
    let deadline = cx.deadline("reboot_vm");
    let (lock, mut vm) = machine::lock(cx, cid, deadline)?;
    // The start gets the other half of the time.
    let half = deadline.saturating_duration_since(Instant::now()) / 2;
    let timeout = POWER_BUTTON_TIMEOUT.min(half);
    let (paths, vm_context) = (cx.store.vm(cid), cx.vm_context(cid));
    // A VM that would not start again for want of memory keeps running.
    supervisor::ensure_memory(&vm_context, &vm)?;
    // Nor would one whose light stemcell's image has changed.
    let base = vm.base.clone();
    read_by_deadline(&vm.base.path, deadline, move || base.ensure_unchanged())??;
    supervisor::stop(&paths, StopMode::PowerButton(timeout), deadline)?;
    // Ends a QEMU whose pid file is gone: an operator has emptied the run directory.
    Cgroup::open(cid.as_str()).kill(deadline)?;
    vm.run += 1;
    vm.desired = Desired::Running;
    cx.store.write(&vm)?;
    supervisor::start(&vm_context, cx.config_file(), &lock, deadline)
        .map_err(|e| e.during(format!("start VM '{cid}' again")))
}
