//! VMs as far as they are processes.

use super::{Audit, Kind};
use crate::cpi::machine::is_all_off;
use crate::error::Result;
use crate::store::record::Desired;
use crate::store::{Phase, Rank, VmRecord};
use crate::supervisor::{self, Ending, ExitRecord, PowerState, power_state};
use crate::sys::pidlock;

const TO_TELL: &str =
    "`bosh delete-vm` it, unless a Director knows it; that goes by itself if its address is wanted";
const EXIT_LOST: &str =
    "move the file away: then the VM counts as crashed, and `bosh-qemu-cpi host start` starts it";

impl Audit<'_> {
    pub(super) fn machines(&mut self) -> Result<()> {
        let vms = self.cpi.store.list::<VmRecord>()?;
        for vm in &vms {
            if let Ok(Some(record)) = self.cpi.store.read::<VmRecord>(vm)
                && record.phase == Phase::Ready
                && let Err(error) = self.machine(&record)
            {
                self.unknown(vm, &error);
            }
        }
        Ok(())
    }

    fn machine(&mut self, vm: &VmRecord) -> Result<()> {
        let Some(hold) = self.idle(Rank::Vm, &vm.cid) else { return Ok(()) };
        if self.cpi.is_untold_vm(vm)? {
            self.told(
                Kind::Untold,
                &vm.cid,
                "its create_vm was killed before anybody was told of it",
                TO_TELL,
            );
        }
        let paths = self.cpi.store.vm(&vm.cid);
        let supervised = pidlock::holder(&paths.supervisor_pid())?.is_some();
        match power_state(&paths)? {
            PowerState::On(_) if !supervised => {
                let cpi = self.cpi;
                self.found(
                    Kind::Unsupervised,
                    &vm.cid,
                    "nothing watches it: it would not be restarted",
                    || {
                        let config_file = cpi.config_file.as_deref();
                        supervisor::adopt(
                            &cpi.scope(&vm.cid),
                            config_file,
                            hold.lock(),
                            Self::deadline(),
                        )
                        .map(drop)
                    },
                );
            }
            // A supervisor without a QEMU is about to start one.
            PowerState::Off if !supervised && vm.desired == Desired::Running => {
                let exit = match ExitRecord::read(&paths.exit()) {
                    Ok(exit) => exit.filter(|exit| exit.run == vm.run),
                    Err(error) => {
                        self.told(Kind::Corrupt, &vm.cid, &error.chain(), EXIT_LOST);
                        return Ok(());
                    }
                };
                if let Err(error) = is_all_off(&vm.cid, &paths) {
                    self.unknown(&vm.cid, &error);
                } else if exit.as_ref().is_none_or(|exit| exit.ending() != Ending::PoweredOff) {
                    let why = exit.map_or_else(
                        || "nothing says how it ended".to_owned(),
                        |exit| exit.describe(),
                    );
                    self.told(
                        Kind::Down,
                        &vm.cid,
                        &why,
                        "`bosh-qemu-cpi host start`, or reboot_vm, starts it",
                    );
                }
            }
            _ => {}
        }
        Ok(())
    }
}
