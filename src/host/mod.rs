//! This host, as far as VMs live on it: their cgroups, memory and uids, what QEMU can do here, how a supervisor is started.

pub mod cgroup;
pub mod clock;
pub mod detached;
pub mod installation;
pub mod io_uring;
pub mod memory;
pub mod mounts;
pub mod probe;
pub mod tail;
pub mod uids;
