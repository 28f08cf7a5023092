//! What a VM's processes may have: sizes that were measured, and the room above them.
//!
//! A limit is there for a QEMU that runs wild. One that ends a healthy QEMU is worse than none, so it counts everything a
//! healthy one can ever have at once. Measured with QEMU 10.0.2, 18 qcow2 disks of 200 GiB each on ports of their own:
//!
//! | | memory that can not be dropped |
//! |---|---|
//! | no disk, 16 empty ports | 42 to 53 MiB |
//! | 18 disks, idle | 98 MiB |
//! | every disk written all over, 64 requests of 4 KiB at a time | 490 MiB: the caches of their maps |
//! | then 32 requests of 1 MiB at a time | 508 MiB at the most |
//! | the kernel's own in its behalf (rings, page tables) | 4 MiB |
//!
//! The page cache of images counts towards a group too, but is dropped at the limit. That of a tmpfs is not: images there
//! are memory, so a VM whose state is on one has no limit.

use super::VmContext;
use crate::host::cgroup::Limits;
use crate::store::record::{Accel, VmRecord};
use crate::units::Bytes;

const MIB: u64 = 1 << 20;

/// QEMU itself, its threads and buffers, and the supervisor; five times what was measured.
const QEMU: u64 = 256 * MIB;
/// An image: the map of a qcow2 is cached up to 32 MiB, and a copy of it (snapshot, resize) has buffers of 16.
const IMAGE: u64 = 48 * MIB;
/// Root disk, its base, ephemeral disk, config drive.
const IMAGES_OF_ITS_OWN: u64 = 4;
/// Emulation keeps the code it translated, 1 GiB at the most (`tb-size`, tcg/region.c).
const TRANSLATED: u64 = 1 << 30;
/// The kernel's page tables for guest memory: 8 bytes for 4 KiB, in QEMU's and in KVM's tables, and as much again for
/// KVM's reverse maps of nested guests. A 32nd part is five times that.
const PAGE_TABLES: u64 = 32;

/// Threads that come and go: 64 for each of two event loops without io_uring; io_uring's own, four for each CPU of the
/// host. More than any was seen to have; a QEMU that can not have a thread aborts.
const THREADS: u64 = 1024;

/// What a QEMU has besides its guest's memory when it has done some work. For sums over many VMs, not for limits.
pub(super) const QEMU_USUAL_BYTES: u64 = 64 * MIB;

/// The limits of the VM's control groups.
pub(super) fn for_vm(context: &VmContext, vm: &VmRecord) -> Limits {
    let in_memory =
        rustix::fs::statfs(context.store.state_dir()).is_ok_and(|stat| stat.f_type == TMPFS_MAGIC);
    Limits {
        memory: (!in_memory).then(|| memory(vm)),
        pids: THREADS + u64::from(vm.machine.cpus),
        cpu_weight: vm.cpu_weight,
    }
}

/// statfs(2).
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

fn memory(vm: &VmRecord) -> Bytes {
    let ram = vm.machine.ram.bytes().get();
    let images = IMAGES_OF_ITS_OWN + u64::from(vm.machine.hotplug_slots);
    let translated = if vm.machine.accel == Accel::Tcg { TRANSLATED } else { 0 };
    Bytes(ram + ram / PAGE_TABLES + QEMU + images * IMAGE + translated)
}
