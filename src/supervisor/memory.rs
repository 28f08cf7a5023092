//! Memory admission: whether the host has the memory for one more VM.
//!
//! The kernel allocates guest memory when the guest first touches it. So part of the memory that is
//! available now is already promised to VMs:
//!
//! ```text
//!   MemAvailable  =  reserve       |  promised, not touched yet  |  unpromised
//!                    in the           to every VM that runs,        for VMs
//!                    configuration    starts or restarts            that start
//! ```
//!
//! The supervisor of a VM that starts checks this under one lock for the host. It locks
//! `supervisor.pid` under the same lock, which counts as its VM's promise. So two VMs that start at
//! the same time cannot both count on the same memory. A restart after a crash is not checked,
//! because the VM's promise never ended.

use std::time::{Duration, Instant};

use super::VmContext;
use super::limits::QEMU_USUAL_BYTES;
use super::power::{PowerState, power_state};
use crate::cid::VmCid;
use crate::config::{Config, Memory};
use crate::error::{Error, ErrorKind, Result};
use crate::host::memory::{available, resident};
use crate::store::{Phase, Rank, ShortLock, Store, VmRecord};
use crate::sys::pidlock;
use crate::units::Bytes;

/// How long to wait for the memory lock; each supervisor holds it for milliseconds.
const MEMORY_LOCK_TIMEOUT: Duration = Duration::from_secs(30);
/// The most VMs that an error message names.
const MAX_NAMED_VMS: usize = 10;

/// Acquires the host's memory lock. A supervisor holds it from before it locks `supervisor.pid`
/// until its VM is admitted.
pub(super) fn lock(context: &VmContext) -> Result<ShortLock> {
    context.store.short_lock(Rank::Memory, "host", Instant::now() + MEMORY_LOCK_TIMEOUT)
}

/// Checks that the host has the memory for `vm` to start, or to start again if it runs.
///
/// # Errors
/// [`ErrorKind::NotEnoughMemory`] with all sizes and the largest VMs.
pub fn ensure_memory(context: &VmContext, vm: &VmRecord) -> Result<()> {
    let own = match power_state(&context.paths)? {
        PowerState::On(qemu) => resident(qemu.pid()).get(),
        PowerState::Off => 0,
    };
    HostMemory {
        need: promised_to(vm).saturating_sub(own),
        ..HostMemory::of(&context.config, &context.store, Some(&context.cid))?
    }
    .ensure_fits(vm)
}

/// Returns the largest `ram` in bytes that a new VM could have now.
///
/// # Errors
/// [`ErrorKind::Host`] if the kernel does not report its available memory.
pub fn largest_vm(config: &Config, store: &Store) -> Result<Bytes> {
    HostMemory::of(config, store, None)
        .map(|memory| Bytes(memory.unpromised().saturating_sub(QEMU_USUAL_BYTES)))
}

/// Returns the bytes that the VM may use when its guest has touched all its memory.
fn promised_to(vm: &VmRecord) -> u64 {
    vm.machine.ram.bytes().get() + QEMU_USUAL_BYTES
}

/// The memory of a VM that runs or starts, in bytes.
#[derive(Debug)]
struct VmMemory {
    cid: VmCid,
    promised: u64,
    touched: u64,
    /// Whether the VM is being deleted: its memory will be free in a moment.
    deleting: bool,
}

impl VmMemory {
    /// Returns the memory of the VM `cid`; `None` if it is off.
    fn of(store: &Store, cid: VmCid) -> Result<Option<Self>> {
        let paths = store.vm(&cid);
        let qemu = pidlock::holder(&paths.qemu_pid())?;
        if qemu.is_none() && pidlock::holder(&paths.supervisor_pid())?.is_none() {
            return Ok(None);
        }
        let touched = qemu.map_or(0, |qemu| resident(qemu.pid()).get());
        // An unreadable record must not keep all other VMs from starting. Its VM counts with the
        // memory it has touched.
        let record = store.read::<VmRecord>(&cid).ok().flatten();
        let deleting = record.as_ref().is_some_and(|record| record.phase == Phase::Deleting);
        let promised = record.as_ref().map_or(touched, promised_to);
        Ok(Some(Self { cid, promised, touched, deleting }))
    }

    fn untouched(&self) -> u64 {
        if self.deleting { 0 } else { self.promised.saturating_sub(self.touched) }
    }
}

/// The host's memory as the admission sees it, in bytes.
#[derive(Debug)]
struct HostMemory {
    /// What the VM that starts needs.
    need: u64,
    /// The kernel's `MemAvailable`.
    available: u64,
    /// `limits.memory_reserve_mib`.
    reserve: u64,
    /// The VMs that run or start; none if the configuration allows overcommit.
    vms: Vec<VmMemory>,
}

impl HostMemory {
    /// Reads the host's memory, with all VMs but `except`, and with `need` 0.
    fn of(config: &Config, store: &Store, except: Option<&VmCid>) -> Result<Self> {
        let mut vms = Vec::new();
        if config.limits.memory == Memory::Guaranteed {
            for cid in store.list::<VmRecord>()?.into_iter().filter(|cid| Some(cid) != except) {
                vms.extend(VmMemory::of(store, cid)?);
            }
        }
        let reserve = config.limits.memory_reserve_mib.get() << 20;
        Ok(Self { need: 0, available: available()?.get(), reserve, vms })
    }

    fn untouched(&self) -> u64 {
        self.vms.iter().map(VmMemory::untouched).sum()
    }

    /// Memory that is neither reserved nor promised to a VM.
    fn unpromised(&self) -> u64 {
        self.available.saturating_sub(self.reserve + self.untouched())
    }

    fn ensure_fits(&self, vm: &VmRecord) -> Result<()> {
        let untouched = self.untouched();
        let committed = self.reserve + untouched;
        if committed + self.need <= self.available {
            return Ok(());
        }
        let returning: u64 = self.vms.iter().filter(|vm| vm.deleting).map(|vm| vm.touched).sum();
        let passing = committed + self.need <= self.available + returning;
        let message = format!(
            "the host does not have the memory for VM '{}': it needs {} ({} for the guest), \
             {} are left: {} are available, {} are reserved, \
             and {} promised to {} other VMs are not touched yet",
            vm.cid,
            mib(self.need),
            vm.machine.ram,
            mib(self.unpromised()),
            mib(self.available),
            mib(self.reserve),
            mib(untouched),
            self.vms.len(),
        );
        let hint = format!(
            "delete or shrink VMs, lower `limits.memory_reserve_mib`, \
             or let VMs share the memory they do not use (`limits.memory: overcommit`); {}",
            self.largest()
        );
        Err(Error::new(ErrorKind::NotEnoughMemory { temporary: passing }, message).hint(hint))
    }

    /// Describes the VMs with the most memory, for the hint.
    fn largest(&self) -> String {
        let mut vms: Vec<_> = self.vms.iter().collect();
        vms.sort_by_key(|vm| std::cmp::Reverse(vm.promised.max(vm.touched)));
        let named = |vm: &&VmMemory| {
            let deleting = if vm.deleting { ", being deleted" } else { "" };
            let (touched, promised) = (mib(vm.touched), mib(vm.promised));
            format!("{} has {touched} of {promised}{deleting}", vm.cid)
        };
        let names: Vec<_> = vms.iter().take(MAX_NAMED_VMS).map(named).collect();
        let more = vms.len().saturating_sub(MAX_NAMED_VMS);
        match (names.is_empty(), more) {
            (true, _) => "no other VM counts".to_owned(),
            (false, 0) => names.join(", "),
            (false, more) => format!("{}, and {more} more", names.join(", ")),
        }
    }
}

/// Formats a size in MiB, the unit of `ram` and `limits.memory_reserve_mib`, rounded up.
fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}
