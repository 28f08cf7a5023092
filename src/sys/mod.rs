//! The operating system: the only rooms with unsafe code, each behind a safe function. They know Linux, not BOSH or QEMU.

pub mod code;
pub mod confine;
pub mod detach;
pub mod io_uring;
mod landlock;
pub mod packet;
pub mod parent_death;
pub mod pidfd;
pub mod pidlock;
pub mod signals;
pub mod tun;
