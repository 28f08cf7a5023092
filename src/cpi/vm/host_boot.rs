//! All VMs of the host: started when the host boots, stopped when it shuts down.
//!
//! ```text
//!               desired   QEMU    exit.json of this run          host start
//!   VM          running   off     none, crashed, host stopping   starts it, same MACs and disks
//!               running   off     the guest powered itself off   leaves it off
//!               running   on                                     adopts it if its supervisor died
//!               stopped                                          leaves it off
//! ```
//!
//! Neither creates or deletes: a VM that is half created or half deleted is left to the next
//! create_vm or delete_vm.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde::Serialize;

use crate::cid::VmCid;
use crate::cpi::context::Context;
use crate::cpi::deadlines::default_timeout;
use crate::cpi::machine;
use crate::error::Result;
use crate::store::record::Desired;
use crate::store::{Phase, Rank, VmRecord};
use crate::supervisor::{self, Adoption, Ending, ExitRecord, PowerState, StopMode, power_state};
use crate::sys::pidlock;

/// The metadata tag by which operators order starts: the VM with the larger number starts first.
const PRIORITY: &str = "start_priority";

/// The `director` tag of a VM that `bosh create-env` made: a Director, which starts before its VMs.
const CREATE_ENV: &str = "bosh-init";

/// How long to wait for a call that holds the lock of a VM, before the VM is reported as failed.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60);

/// The result for one VM.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// The VM.
    pub vm: VmCid,
    /// Its BOSH name (`db/0`), from set_vm_metadata.
    pub name: Option<String>,
    /// What was done with it.
    pub state: State,
    /// How long that took, in seconds.
    pub seconds: f64,
}

/// What was done with a VM.
#[derive(Debug, Serialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It was off and is on now.
    Started,
    /// It was on, without a supervisor; it has one now.
    Adopted,
    /// It was on.
    Running,
    /// It was on and is off now.
    Stopped,
    /// It stays off, for this reason.
    Off(String),
    /// It could not be started or stopped, for this reason.
    Failed(String),
}

/// Starts every VM whose desired state is running, as many at a time as there are boot slots. The
/// outcomes are in the order of the starts.
///
/// # Errors
/// Only if the records cannot be listed; the failure of one VM is its outcome.
pub fn start_all(cx: &Context) -> Result<Vec<Outcome>> {
    cx.store.prepare()?;
    let at_once = supervisor::boot_slots(&cx.config.limits);
    Ok(each(&all_vms(cx)?, at_once, |vm| bring_back(cx, vm)))
}

/// Powers off every VM, all at once. A guest that takes longer than `timeout` is ended.
///
/// # Errors
/// As [`start_all`].
pub fn stop_all(cx: &Context, timeout: Duration) -> Result<Vec<Outcome>> {
    let until = Instant::now() + timeout;
    let vms = all_vms(cx)?;
    Ok(each(&vms, vms.len(), |vm| power_off(cx, vm, until)))
}

/// The records of all VMs that are ready, the most important first, and the VMs whose records
/// cannot be read.
fn all_vms(cx: &Context) -> Result<Vec<(VmCid, Result<VmRecord>)>> {
    let read = |cid: VmCid| {
        let vm = cx.store.find::<VmRecord>(&cid).transpose();
        vm.map(|vm| (cid, vm))
    };
    let mut vms: Vec<_> = cx.store.list::<VmRecord>()?.into_iter().filter_map(read).collect();
    vms.retain(|(_, vm)| vm.as_ref().map_or(true, |vm| vm.phase == Phase::Ready));
    vms.sort_by_cached_key(|(_, vm)| vm.as_ref().ok().map(importance));
    Ok(vms)
}

fn each(
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

fn bring_back(cx: &Context, vm: &VmRecord) -> Result<State> {
    let lock = cx.store.lock(Rank::Vm, &vm.cid, Instant::now() + LOCK_TIMEOUT)?;
    let mut vm = match cx.store.find::<VmRecord>(&vm.cid)? {
        Some(vm) if vm.phase == Phase::Ready => vm,
        Some(_) => return Ok(State::Off("it is being deleted".into())),
        None => return lock.unlink().map(|()| State::Off("it was deleted".into())),
    };
    let (vm_context, config_file) = (cx.vm_context(&vm.cid), cx.config_file());
    let deadline = Instant::now() + cx.config.deadline("reboot_vm", default_timeout("reboot_vm"));
    if let PowerState::On(_) = power_state(&vm_context.paths)? {
        return Ok(match supervisor::adopt(&vm_context, config_file, &lock, deadline)? {
            Adoption::NotNeeded => State::Running,
            Adoption::Adopted => State::Adopted,
            Adoption::Launched => State::Started,
        });
    }
    if vm.desired == Desired::Stopped {
        return Ok(State::Off("its desired state is stopped".into()));
    }
    let exit = ExitRecord::read(&vm_context.paths.exit())?.filter(|exit| exit.run == vm.run);
    if exit.is_some_and(|exit| exit.ending() == Ending::PoweredOff) {
        return Ok(State::Off("its guest powered itself off".into()));
    }
    // A supervisor that waits before it restarts the VM ends: this start replaces it.
    supervisor::stop(&vm_context.paths, StopMode::Quit, deadline)?;
    machine::ensure_off(&vm.cid, &vm_context.paths)?;
    vm.run += 1;
    cx.store.write(&vm)?;
    supervisor::start(&vm_context, config_file, &lock, deadline)?;
    Ok(State::Started)
}

/// Takes no lock: a host that shuts down does not wait for calls, and nothing is written here.
fn power_off(cx: &Context, vm: &VmRecord, until: Instant) -> Result<State> {
    let paths = cx.store.vm(&vm.cid);
    // The supervisor presses the power button, and records that the VM is to run after the next
    // boot.
    match pidlock::holder(&paths.supervisor_pid())? {
        Some(supervisor) => supervisor.signal(Signal::SIGTERM)?,
        None => return power_off_alone(cx, vm, until),
    }
    if let PowerState::On(qemu) = power_state(&paths)? {
        qemu.wait_exit(until)?;
    }
    // A QEMU that still runs is ended. A supervisor that has to write its exit record is waited
    // for.
    supervisor::stop(&paths, StopMode::Quit, Instant::now() + LOCK_TIMEOUT)?;
    Ok(State::Stopped)
}

/// Powers off a VM without a supervisor. It has no exit record, so it does not count as powered off
/// by its guest.
fn power_off_alone(cx: &Context, vm: &VmRecord, until: Instant) -> Result<State> {
    let paths = cx.store.vm(&vm.cid);
    if let PowerState::Off = power_state(&paths)? {
        return Ok(State::Off("it was off".into()));
    }
    let timeout = until.saturating_duration_since(Instant::now());
    supervisor::stop(&paths, StopMode::PowerButton(timeout), until + LOCK_TIMEOUT)?;
    Ok(State::Stopped)
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

/// A key that sorts the most important VM first: by the operator's tag, then Directors, then by
/// age.
fn importance(vm: &VmRecord) -> (std::cmp::Reverse<i64>, bool, String) {
    let priority = vm.tag(PRIORITY).and_then(|priority| priority.parse().ok()).unwrap_or(0);
    (std::cmp::Reverse(priority), vm.tag("director") != Some(CREATE_ENV), vm.created_at.clone())
}
