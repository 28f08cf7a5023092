//! Whether the kernel lets this process use io_uring.
#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc;

/// Asks for a ring without saying where to describe it. Who may have one is told that there is no such address; who
/// may not is refused before (io_uring_setup(2): ENOSYS, EPERM; a container's filter answers either).
pub fn is_allowed() -> bool {
    // SAFETY: the null pointer is the kernel's to check, and no ring is made without it.
    let answer =
        unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, std::ptr::null_mut::<libc::c_void>()) };
    answer == -1 && Errno::last() == Errno::EFAULT
}
