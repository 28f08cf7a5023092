//! The machine that runs VMs: its control groups, memory, uids and mounts, what QEMU can do on it,
//! and the installation of this program.

pub mod cgroup;
pub mod clock;
pub mod detached;
pub mod installation;
pub mod io_uring;
mod kvm_guest;
pub mod memory;
pub mod mounts;
pub mod probe;
pub mod tail;
pub mod uids;
