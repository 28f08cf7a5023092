//! VMs that are off and should run, and VMs without a supervisor.

use super::{Audit, Kind};
use crate::cpi::creation::acknowledgement;
use crate::cpi::machine;
use crate::error::Result;
use crate::store::record::Desired;
use crate::store::{Phase, Rank, VmRecord};
use crate::supervisor::{self, Ending, ExitRecord, PowerState, power_state};
use crate::sys::pidlock;

const NEXT_UNACKNOWLEDGED: &str = "`bosh delete-vm` it, unless a Director has the cid; a create \
                                   that needs its address deletes it, too";
const NEXT_EXIT_RECORD: &str =
    "move the file away: then the VM counts as crashed, and `bosh-qemu-cpi host start` starts it";

impl Audit<'_> {
    pub(super) fn vms(&mut self) -> Result<()> {
        let vms = self.cx.store.list::<VmRecord>()?;
        for vm in &vms {
            if let Ok(Some(record)) = self.cx.store.read::<VmRecord>(vm)
                && record.phase == Phase::Ready
                && let Err(error) = self.vm(&record)
            {
                self.unknown(vm, &error);
            }
        }
        Ok(())
    }

    fn vm(&mut self, vm: &VmRecord) -> Result<()> {
        let Some(lock) = self.lock_object(Rank::Vm, &vm.cid) else { return Ok(()) };
        if acknowledgement::is_vm_unacknowledged(self.cx, vm)? {
            self.for_operator(
                Kind::Unacknowledged,
                &vm.cid,
                "its create_vm was killed before the caller had the cid",
                NEXT_UNACKNOWLEDGED,
            );
        }
        let paths = self.cx.store.vm(&vm.cid);
        let supervised = pidlock::holder(&paths.supervisor_pid())?.is_some();
        match power_state(&paths)? {
            PowerState::On(_) if !supervised => {
                let cx = self.cx;
                self.found(
                    Kind::Unsupervised,
                    &vm.cid,
                    "it has no supervisor, and would not be restarted after a crash",
                    || {
                        let vm_context = cx.vm_context(&vm.cid);
                        let (lock, deadline) = (lock.exclusive(), Self::deadline());
                        supervisor::adopt(&vm_context, cx.config_file(), lock, deadline).map(drop)
                    },
                );
            }
            // A supervisor without a QEMU is about to start one.
            PowerState::Off if !supervised && vm.desired == Desired::Running => {
                let exit = match ExitRecord::read(&paths.exit()) {
                    Ok(exit) => exit.filter(|exit| exit.run == vm.run),
                    Err(error) => {
                        self.for_operator(Kind::Corrupt, &vm.cid, &error.chain(), NEXT_EXIT_RECORD);
                        return Ok(());
                    }
                };
                if let Err(error) = machine::ensure_off(&vm.cid, &paths) {
                    self.unknown(&vm.cid, &error);
                } else if exit.as_ref().is_none_or(is_unexpected) {
                    let why = exit
                        .map_or_else(|| "it has no exit record".to_owned(), |exit| exit.describe());
                    self.for_operator(
                        Kind::Down,
                        &vm.cid,
                        &why,
                        "`bosh-qemu-cpi host start` or reboot_vm starts it",
                    );
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Whether a VM that should run is off although neither its guest nor `host stop` ended this run. A
/// start by `host start` begins another run, so a VM that it cannot start is unexpected.
fn is_unexpected(exit: &ExitRecord) -> bool {
    exit.ending() != Ending::PoweredOff && !exit.host_stopping
}
