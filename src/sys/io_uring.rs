//! Whether the kernel lets this process use io_uring.
#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc;

/// Returns whether this process may make an io_uring. It calls io_uring_setup(2) with a null
/// pointer: the kernel answers EFAULT if the process may have a ring, else ENOSYS or EPERM. A
/// container's filter answers one of the latter.
pub fn is_allowed() -> bool {
    // SAFETY: the kernel checks the pointer and makes no ring for a null pointer.
    let answer =
        unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, std::ptr::null_mut::<libc::c_void>()) };
    answer == -1 && Errno::last() == Errno::EFAULT
}
