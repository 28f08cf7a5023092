//! Whether the host has the memory for one more VM.
//!
//! A guest's memory is had when the guest first touches it, so what is free now has been promised in part already:
//!
//! ```text
//!   MemAvailable  =  reserve  |  promised, not touched yet  |  to give
//!                    config      every VM that runs, is         what a VM that starts may need
//!                                starting or restarting
//! ```
//!
//! Asked by the supervisor of a VM that starts, under one lock for the host. Its own promise is its lock of
//! `supervisor.pid`: others see it before that lock is free again, so two that start at once can not both count on the
//! same memory. A restart after a crash is not asked about: its promise was never taken back.

use std::time::{Duration, Instant};

use super::Scope;
use super::limits::USUAL;
use super::power::{PowerState, power_state};
use crate::cid::VmCid;
use crate::config::{Config, Memory};
use crate::error::{Error, ErrorKind, Result};
use crate::host::memory::{available, resident};
use crate::store::{Phase, Rank, ShortLock, Store, VmRecord};
use crate::sys::pidlock;
use crate::units::Bytes;

/// Each holds the lock for milliseconds.
const LOCK: Duration = Duration::from_secs(30);
/// The most VMs that an error names.
const NAMED: usize = 10;

/// Taken before a VM shows that it starts, and given back when it may.
pub(super) fn lock(scope: &Scope) -> Result<ShortLock> {
    scope.store.short_lock(Rank::Memory, "host", Instant::now() + LOCK)
}

/// Whether the host has the memory for `vm` to start, or, if it runs, to start again.
///
/// # Errors
/// [`ErrorKind::NotEnoughMemory`] with the figures.
pub fn admit(scope: &Scope, vm: &VmRecord) -> Result<()> {
    let own = match power_state(&scope.paths)? {
        PowerState::On(qemu) => resident(qemu.pid()).get(),
        PowerState::Off => 0,
    };
    Figures {
        need: promise(vm).saturating_sub(own),
        ..Figures::of(&scope.config, &scope.store, Some(&scope.cid))?
    }
    .verdict(vm)
}

/// The largest `ram` that a new VM could have now.
///
/// # Errors
/// [`ErrorKind::Host`] if the kernel does not say.
pub fn largest_vm(config: &Config, store: &Store) -> Result<Bytes> {
    Figures::of(config, store, None).map(|figures| Bytes(figures.left().saturating_sub(USUAL)))
}

/// Bytes the VM may come to have.
fn promise(vm: &VmRecord) -> u64 {
    vm.machine.ram.bytes().get() + USUAL
}

/// A VM that has memory, or was promised some.
#[derive(Debug)]
struct Claim {
    vm: VmCid,
    promised: u64,
    touched: u64,
    /// It is being deleted: what it has is free in a moment.
    ending: bool,
}

impl Claim {
    /// That of another VM; `None` if it is off.
    fn of(store: &Store, vm: VmCid) -> Result<Option<Self>> {
        let paths = store.vm(&vm);
        let qemu = pidlock::holder(&paths.qemu_pid())?;
        if qemu.is_none() && pidlock::holder(&paths.supervisor_pid())?.is_none() {
            return Ok(None);
        }
        let touched = qemu.map_or(0, |qemu| resident(qemu.pid()).get());
        // A record that can not be read must not keep all others from starting: at least what is there counts.
        let record = store.read::<VmRecord>(&vm).ok().flatten();
        let ending = record.as_ref().is_some_and(|record| record.phase == Phase::Deleting);
        let promised = record.as_ref().map_or(touched, promise);
        Ok(Some(Self { vm, promised, touched, ending }))
    }

    fn untouched(&self) -> u64 {
        if self.ending { 0 } else { self.promised.saturating_sub(self.touched) }
    }
}

/// All that decides, in bytes.
#[derive(Debug)]
struct Figures {
    need: u64,
    available: u64,
    reserve: u64,
    claims: Vec<Claim>,
}

impl Figures {
    /// Those of the host without the VM `except`, and with nothing that needs any.
    fn of(config: &Config, store: &Store, except: Option<&VmCid>) -> Result<Self> {
        let mut claims = Vec::new();
        if config.limits.memory == Memory::Guaranteed {
            for cid in store.list::<VmRecord>()?.into_iter().filter(|cid| Some(cid) != except) {
                claims.extend(Claim::of(store, cid)?);
            }
        }
        let reserve = config.limits.memory_reserve_mib.get() << 20;
        Ok(Self { need: 0, available: available()?.get(), reserve, claims })
    }

    fn untouched(&self) -> u64 {
        self.claims.iter().map(Claim::untouched).sum()
    }

    /// What nobody was promised.
    fn left(&self) -> u64 {
        self.available.saturating_sub(self.reserve + self.untouched())
    }

    fn verdict(&self, vm: &VmRecord) -> Result<()> {
        let untouched = self.untouched();
        let taken = self.reserve + untouched;
        if taken + self.need <= self.available {
            return Ok(());
        }
        let returning: u64 =
            self.claims.iter().filter(|claim| claim.ending).map(|claim| claim.touched).sum();
        let passing = taken + self.need <= self.available + returning;
        let message = format!(
            "the host has not the memory for VM '{}': it needs {} ({} for the guest), {} are left: {} are available, \
             {} are reserved, and {} promised to {} other VMs are not touched yet",
            vm.cid,
            mib(self.need),
            vm.machine.ram,
            mib(self.left()),
            mib(self.available),
            mib(self.reserve),
            mib(untouched),
            self.claims.len(),
        );
        let hint = format!(
            "delete or shrink VMs, lower `limits.memory_reserve_mib`, or let VMs share what they do not use \
             (`limits.memory: overcommit`); {}",
            self.largest()
        );
        Err(Error::new(ErrorKind::NotEnoughMemory { temporary: passing }, message).hint(hint))
    }

    /// The VMs with the most memory promised.
    fn largest(&self) -> String {
        let mut claims: Vec<_> = self.claims.iter().collect();
        claims.sort_by_key(|claim| std::cmp::Reverse(claim.promised.max(claim.touched)));
        let named = |claim: &&Claim| {
            let ending = if claim.ending { ", being deleted" } else { "" };
            format!("{} has {} of {}{ending}", claim.vm, mib(claim.touched), mib(claim.promised))
        };
        let names: Vec<_> = claims.iter().take(NAMED).map(named).collect();
        let more = claims.len().saturating_sub(NAMED);
        match (names.is_empty(), more) {
            (true, _) => "no other VM counts".to_owned(),
            (false, 0) => names.join(", "),
            (false, more) => format!("{}, and {more} more", names.join(", ")),
        }
    }
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}
