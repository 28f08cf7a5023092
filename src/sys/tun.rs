//! `TUNSETIFF`: turns an open `/dev/net/tun` into a tap (Linux, `Documentation/networking/tuntap.rst`).
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_TUN_EXCL, IFF_VNET_HDR, c_int};

/// `struct ifreq` as far as this call reads it: the name, the flags, zeros.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    unused: [u8; 22],
}

/// The kernel copies this many bytes from where the pointer points.
const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<nix::libc::ifreq>());

mod raw {
    // Declared as a write by the kernel's headers, of an int at that; in truth it reads and writes an ifreq.
    use super::{InterfaceRequest, c_int};
    nix::ioctl_readwrite_bad!(
        tunsetiff,
        nix::request_code_write!(b'T', 202, size_of::<c_int>()),
        InterfaceRequest
    );
}

/// Makes a new tap `name` out of `device`, an open `/dev/net/tun`: Ethernet frames, each behind a virtio-net header.
/// With `several`, queues can be added.
///
/// The tap lives as long as a descriptor of `device` or of a further queue does.
///
/// # Errors
/// EBUSY if a link of that name exists, EPERM without CAP_NET_ADMIN, EINVAL for a name the kernel refuses.
pub fn create_tap(device: BorrowedFd<'_>, name: &str, several: bool) -> nix::Result<()> {
    set(device, name, IFF_TUN_EXCL | if several { IFF_MULTI_QUEUE } else { 0 })
}

/// Makes `device` a further queue of the tap `name`, which was made for several.
///
/// # Errors
/// EINVAL if it was not.
pub fn add_queue(device: BorrowedFd<'_>, name: &str) -> nix::Result<()> {
    set(device, name, IFF_MULTI_QUEUE)
}

fn set(device: BorrowedFd<'_>, name: &str, more: c_int) -> nix::Result<()> {
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | more;
    // All of them lie in the lower 16 bits; IFF_TUN_EXCL is the 16th.
    let mut request = InterfaceRequest { name: [0; 16], flags: flags as u16, unused: [0; 22] };
    let (_nul, room) = request.name.split_last_mut().ok_or(Errno::ENAMETOOLONG)?;
    room.get_mut(..name.len()).ok_or(Errno::ENAMETOOLONG)?.copy_from_slice(name.as_bytes());
    // SAFETY: the pointer is to a live value of ifreq's size, which the kernel reads and writes back, and nobody
    // else has; the descriptor is open for the length of the call.
    unsafe { raw::tunsetiff(device.as_raw_fd(), &raw mut request) }.map(drop)
}
