//! All VMs at once: what happens to them when the host boots and when it goes down.
//!
//! ```text
//!               desired   QEMU    exit.json of this run          host start
//!   VM          running   off     none, crashed, host stopping   starts it: same record, so same MACs, serials, disks
//!               running   off     the guest powered itself off   leaves it off
//!               running   on                                     adopts it if its supervisor died
//!               stopped                                          leaves it off
//! ```
//!
//! Nothing here creates or deletes: a VM that was half made or half deleted is left to the next create_vm or delete_vm.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde::Serialize;

use super::Cpi;
use crate::cid::VmCid;
use crate::error::Result;
use crate::store::record::Desired;
use crate::store::{Phase, Rank, VmRecord};
use crate::supervisor::{self, Adoption, Button, Ending, ExitRecord, PowerState, power_state};
use crate::sys::pidlock;

/// A metadata tag by which operators order starts: larger comes first.
const PRIORITY: &str = "start_priority";
/// What `bosh create-env` calls itself in the metadata of the VM it makes: a Director, which others wait for.
const CREATE_ENV: &str = "bosh-init";
/// A lock that a call holds is waited for this long before its VM is reported instead.
const LOCK: Duration = Duration::from_secs(60);

/// What became of one VM.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// The VM.
    pub vm: VmCid,
    /// BOSH's name of it (`db/0`), if set_vm_metadata told it.
    pub name: Option<String>,
    /// What was done.
    pub state: State,
    /// How long it took, seconds.
    pub seconds: f64,
}

/// What was done about a VM.
#[derive(Debug, Serialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It was off and runs now.
    Started,
    /// It ran, without a supervisor; now it has one.
    Adopted,
    /// It ran.
    Running,
    /// It was on and is off.
    Stopped,
    /// It is off, for this reason, and stays so.
    Off(String),
    /// It is not as it should be.
    Failed(String),
}

impl Cpi {
    /// Brings back every VM that should run, some at a time, and answers for each in the order they were begun.
    ///
    /// # Errors
    /// Only if the records can not be listed; what happens to one VM is its outcome.
    pub fn start_all(&self) -> Result<Vec<Outcome>> {
        self.store.prepare()?;
        let at_once = supervisor::boot_slots(&self.config.limits);
        Ok(self.each(&self.all_vms()?, at_once, |vm| self.bring_back(vm)))
    }

    /// Powers every VM off, all at once; a guest that takes longer than `patience` is ended.
    ///
    /// # Errors
    /// As [`Self::start_all`].
    pub fn stop_all(&self, patience: Duration) -> Result<Vec<Outcome>> {
        let until = Instant::now() + patience;
        let vms = self.all_vms()?;
        Ok(self.each(&vms, vms.len(), |vm| self.power_off(vm, until)))
    }

    /// The records of all VMs, the most important first. One that can not be read is not lost on the others.
    fn all_vms(&self) -> Result<Vec<(VmCid, Result<VmRecord>)>> {
        let read = |cid: VmCid| {
            let vm = self.store.find::<VmRecord>(&cid).transpose();
            vm.map(|vm| (cid, vm))
        };
        let mut vms: Vec<_> = self.store.list::<VmRecord>()?.into_iter().filter_map(read).collect();
        vms.retain(|(_, vm)| vm.as_ref().map_or(true, |vm| vm.phase == Phase::Ready));
        vms.sort_by_cached_key(|(_, vm)| vm.as_ref().ok().map(importance));
        Ok(vms)
    }

    fn each(
        &self,
        vms: &[(VmCid, Result<VmRecord>)],
        at_once: usize,
        act: impl Fn(&VmRecord) -> Result<State> + Sync,
    ) -> Vec<Outcome> {
        let next = AtomicUsize::new(0);
        let outcomes = Mutex::new(Vec::with_capacity(vms.len()));
        let work = || {
            while let Some(index) =
                Some(next.fetch_add(1, Ordering::Relaxed)).filter(|index| *index < vms.len())
            {
                let outcome = outcome(&vms[index], &act);
                outcomes.lock().expect("no panic").push((index, outcome));
            }
        };
        std::thread::scope(|threads| {
            for _ in 0..at_once.min(vms.len()) {
                threads.spawn(work);
            }
        });
        let mut outcomes = outcomes.into_inner().expect("no panic");
        outcomes.sort_by_key(|(index, _)| *index);
        outcomes.into_iter().map(|(_, outcome)| outcome).collect()
    }

    fn bring_back(&self, vm: &VmRecord) -> Result<State> {
        let lock = self.store.lock(Rank::Vm, &vm.cid, Instant::now() + LOCK)?;
        let mut vm = match self.store.find::<VmRecord>(&vm.cid)? {
            Some(vm) if vm.phase == Phase::Ready => vm,
            Some(_) => return Ok(State::Off("it is being deleted".into())),
            None => return lock.unlink().map(|()| State::Off("it was deleted".into())),
        };
        let (scope, config_file) = (self.scope(&vm.cid), self.config_file.as_deref());
        let deadline = Instant::now()
            + self.config.deadline("reboot_vm", super::default_deadline("reboot_vm"));
        if let PowerState::On(_) = power_state(&scope.paths)? {
            return Ok(match supervisor::adopt(&scope, config_file, &lock, deadline)? {
                Adoption::Needless => State::Running,
                Adoption::Adopted => State::Adopted,
                Adoption::Launched => State::Started,
            });
        }
        if vm.desired == Desired::Stopped {
            return Ok(State::Off("it is wanted off".into()));
        }
        let exit = ExitRecord::read(&scope.paths.exit())?.filter(|exit| exit.run == vm.run);
        if exit.is_some_and(|exit| exit.ending() == Ending::PoweredOff) {
            return Ok(State::Off("its guest powered itself off".into()));
        }
        // A supervisor may be in its back-off: this start is the one it waits for.
        supervisor::stop(&scope.paths, Button::Quit, deadline)?;
        super::power::is_all_off(&vm.cid, &scope.paths)?;
        vm.run += 1;
        self.store.write(&vm)?;
        supervisor::start(&scope, config_file, &lock, deadline)?;
        Ok(State::Started)
    }

    /// The VM's lock is not taken: a call that works on it is not waited for, and nothing is written.
    fn power_off(&self, vm: &VmRecord, until: Instant) -> Result<State> {
        let paths = self.store.vm(&vm.cid);
        // The supervisor presses the power button, and writes down that the guest is wanted again.
        match pidlock::holder(&paths.supervisor_pid())? {
            Some(supervisor) => supervisor.signal(Signal::SIGTERM)?,
            None => return self.power_off_alone(vm, until),
        }
        if let PowerState::On(qemu) = power_state(&paths)? {
            qemu.wait_exit(until)?;
        }
        // Whoever is still there ends now; a supervisor that has still to write down the end is waited for.
        supervisor::stop(&paths, Button::Quit, Instant::now() + LOCK)?;
        Ok(State::Stopped)
    }

    /// A VM without a supervisor: that its guest did as it was told must not be taken for its own wish.
    fn power_off_alone(&self, vm: &VmRecord, until: Instant) -> Result<State> {
        let paths = self.store.vm(&vm.cid);
        if let PowerState::Off = power_state(&paths)? {
            return Ok(State::Off("it was".into()));
        }
        let patience = until.saturating_duration_since(Instant::now());
        supervisor::stop(&paths, Button::Press(patience), until + LOCK)?;
        Ok(State::Stopped)
    }
}

fn outcome(
    (cid, vm): &(VmCid, Result<VmRecord>),
    act: impl Fn(&VmRecord) -> Result<State>,
) -> Outcome {
    let began = Instant::now();
    let done = match vm {
        Ok(vm) => act(vm).map_err(|error| error.report()),
        Err(error) => Err(error.report()),
    };
    Outcome {
        vm: cid.clone(),
        name: vm.as_ref().ok().and_then(VmRecord::name).map(str::to_owned),
        state: done.unwrap_or_else(State::Failed),
        seconds: began.elapsed().as_secs_f64(),
    }
}

/// Sorts the most important first: by the operator's tag, then Directors, then the oldest.
fn importance(vm: &VmRecord) -> (std::cmp::Reverse<i64>, bool, String) {
    let priority = vm.tag(PRIORITY).and_then(|priority| priority.parse().ok()).unwrap_or(0);
    (std::cmp::Reverse(priority), vm.tag("director") != Some(CREATE_ENV), vm.created_at.clone())
}
