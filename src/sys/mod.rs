//! Linux system calls behind safe functions: all unsafe code of this program is here. These modules
//! do not know BOSH.

pub mod abort;
pub mod code;
pub mod confine;
pub mod detach;
pub mod inherit;
pub mod io_uring;
mod landlock;
pub mod limits;
pub mod packet;
pub mod parent_death;
pub mod pidfd;
pub mod pidlock;
mod seccomp;
pub mod signals;
pub mod tun;
