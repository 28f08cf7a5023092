//! The limits of a VM's control groups: measured sizes, plus a margin.
//!
//! A limit ends a QEMU that runs wild. A limit that ends a healthy QEMU is worse than none, so it
//! covers everything that a healthy QEMU can use at once. Measured with QEMU 10.0.2 and 18 qcow2
//! disks of 200 GiB, each on a port of its own:
//!
//! | | memory that cannot be dropped |
//! |---|---|
//! | no disk, 16 empty ports | 42 to 53 MiB |
//! | 18 disks, idle | 98 MiB |
//! | all disks fully written, 64 requests of 4 KiB at a time | 490 MiB: the caches of their maps |
//! | then 32 requests of 1 MiB at a time | at most 508 MiB |
//! | the kernel's memory for QEMU (rings, page tables) | 4 MiB |
//!
//! The page cache of images counts towards a group too, but the kernel drops it at the limit. On a
//! tmpfs it cannot: images there are memory. So a VM has no memory limit if its state directory is
//! on a tmpfs.

use super::VmContext;
use crate::host::cgroup::Limits;
use crate::store::record::{Accel, VmRecord};
use crate::units::Bytes;

const MIB: u64 = 1 << 20;

/// QEMU itself, its threads and buffers, and the supervisor: five times the measured size.
const QEMU_BYTES: u64 = 256 * MIB;
/// One image: QEMU caches up to 32 MiB of a qcow2's map, and a copy (snapshot, resize) has buffers
/// of 16 MiB.
const IMAGE_BYTES: u64 = 48 * MIB;
/// Images of every VM: root disk, its base, ephemeral disk, config drive.
const FIXED_IMAGES: u64 = 4;
/// TCG's cache of translated code: at most 1 GiB (`tb-size`, tcg/region.c).
const TCG_CACHE_BYTES: u64 = 1 << 30;
/// Share of guest memory for the kernel's page tables: one part in 32. They take 8 bytes for 4 KiB
/// in QEMU's tables, in KVM's tables, and in KVM's reverse maps of nested guests. The share is five
/// times that.
const PAGE_TABLES_DIVISOR: u64 = 32;

/// Limit of QEMU's worker threads, above the most that were measured: a QEMU that cannot start a
/// thread aborts. Without io_uring, each of two event loops has 64 threads. io_uring has four for
/// each CPU of the host.
const THREADS: u64 = 1024;

/// Bytes that a QEMU typically uses besides its guest's memory. For sums over many VMs, not for
/// limits.
pub(super) const QEMU_USUAL_BYTES: u64 = 64 * MIB;

/// Returns the limits of the VM's control groups.
pub(super) fn for_vm(context: &VmContext, vm: &VmRecord) -> Limits {
    let is_tmpfs =
        rustix::fs::statfs(context.store.state_dir()).is_ok_and(|stat| stat.f_type == TMPFS_MAGIC);
    Limits {
        memory: (!is_tmpfs).then(|| memory(vm)),
        pids: THREADS + u64::from(vm.machine.cpus),
        cpu_weight: vm.cpu_weight,
    }
}

/// `f_type` of a tmpfs (statfs(2)).
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

fn memory(vm: &VmRecord) -> Bytes {
    let ram = vm.machine.ram.bytes().get();
    let images = FIXED_IMAGES + u64::from(vm.machine.hotplug_slots);
    let tcg_cache = if vm.machine.accel == Accel::Tcg { TCG_CACHE_BYTES } else { 0 };
    Bytes(ram + ram / PAGE_TABLES_DIVISOR + QEMU_BYTES + images * IMAGE_BYTES + tcg_cache)
}
