//! VMs as far as they are processes.

use super::{Audit, Kind};
use crate::cid::{Cid, VmCid};
use crate::error::Result;
use crate::host::cgroup::Cgroup;
use crate::store::record::Desired;
use crate::store::{Phase, Rank, VmRecord, atomic};
use crate::supervisor::{self, Button, Ending, ExitRecord, PowerState, power_state};
use crate::sys::pidlock;

impl Audit<'_> {
    pub(super) fn machines(&mut self) -> Result<()> {
        let vms = self.cpi.store.list::<VmRecord>()?;
        for vm in &vms {
            if let Ok(Some(record)) = self.cpi.store.read::<VmRecord>(vm)
                && record.phase == Phase::Ready
            {
                self.machine(&record)?;
            }
        }
        for vm in self.cpi.store.list_running()? {
            if !self.cpi.store.vm(&vm).dir.exists() {
                self.run_directory(&vm)?;
            }
        }
        Ok(())
    }

    fn machine(&mut self, vm: &VmRecord) -> Result<()> {
        let Some(lock) = self.idle(Rank::Vm, &vm.cid)? else { return Ok(()) };
        let paths = self.cpi.store.vm(&vm.cid);
        let supervised = pidlock::holder(&paths.supervisor_pid())?.is_some();
        match power_state(&paths)? {
            PowerState::On(_) if !supervised => {
                let cpi = self.cpi;
                self.found(Kind::Unsupervised, &vm.cid, "nothing watches it: it would not be restarted", || {
                    let config_file = cpi.config_file.as_deref();
                    supervisor::adopt(&cpi.scope(&vm.cid), config_file, &lock, Self::deadline()).map(drop)
                });
            }
            // A supervisor without a QEMU is about to start one.
            PowerState::Off if !supervised && vm.desired == Desired::Running => {
                let exit = ExitRecord::read(&paths.exit())?.filter(|exit| exit.run == vm.run);
                if exit.as_ref().is_none_or(|exit| exit.ending() != Ending::PoweredOff) {
                    let why = exit.map_or_else(|| "nothing says how it ended".to_owned(), |exit| exit.describe());
                    self.told(Kind::Down, &vm.cid, &why, "`bosh-qemu-cpi host start`, or reboot_vm, starts it");
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// A VM's run directory that outlived the VM.
    fn run_directory(&mut self, vm: &VmCid) -> Result<()> {
        let Some(lock) = self.idle(Rank::Vm, vm)? else { return Ok(()) };
        let paths = self.cpi.store.vm(vm);
        let why = match power_state(&paths)? {
            PowerState::On(qemu) => format!("the VM is gone, but its QEMU, process {}, runs", qemu.pid()),
            PowerState::Off => "the VM is gone, but not its sockets".to_owned(),
        };
        self.found(Kind::Orphan, &paths.run.display(), &why, || {
            supervisor::stop(&paths, Button::Quit, Self::deadline())?;
            let group = Cgroup::open(vm.as_str());
            group.kill(Self::deadline())?;
            group.remove()?;
            atomic::remove_dir(&paths.run)
        });
        lock.retire()
    }
}
