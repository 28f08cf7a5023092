//! `TUNSETIFF`: turns an open `/dev/net/tun` into a tap (Linux,
//! `Documentation/networking/tuntap.rst`).
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_TUN_EXCL, IFF_VNET_HDR, c_int};

/// The part of `struct ifreq` that this call reads: the name, the flags, zeros.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    unused: [u8; 22],
}

/// The kernel copies an ifreq's size from the pointer.
const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<nix::libc::ifreq>());

mod raw {
    // The kernel's headers declare a write of an int, but the call reads and writes an ifreq.
    use super::{InterfaceRequest, c_int};
    nix::ioctl_readwrite_bad!(
        tunsetiff,
        nix::request_code_write!(b'T', 202, size_of::<c_int>()),
        InterfaceRequest
    );
}

/// How a tap carries Ethernet frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// Frames alone: complete, with their checksums.
    Plain,
    /// Each frame follows a virtio-net header, by which guest and host leave each other checksums
    /// to fill in and segments to cut.
    VirtioHeader,
}

/// Makes a new tap `name` out of `device`, an open `/dev/net/tun`. If `several`, queues can be
/// added.
///
/// The kernel removes the tap when the last descriptor of `device` and its other queues is closed.
///
/// # Errors
/// EBUSY if a link of that name exists, EPERM without CAP_NET_ADMIN, EINVAL for an invalid name.
pub fn create_tap(
    device: BorrowedFd<'_>,
    name: &str,
    framing: Framing,
    several: bool,
) -> nix::Result<()> {
    set(device, name, framing, IFF_TUN_EXCL | if several { IFF_MULTI_QUEUE } else { 0 })
}

/// Makes `device` another queue of the tap `name`, which was made with `framing` and `several`.
///
/// # Errors
/// EINVAL if the tap was made for one queue.
pub fn add_queue(device: BorrowedFd<'_>, name: &str, framing: Framing) -> nix::Result<()> {
    set(device, name, framing, IFF_MULTI_QUEUE)
}

fn set(device: BorrowedFd<'_>, name: &str, framing: Framing, more: c_int) -> nix::Result<()> {
    let header = if framing == Framing::VirtioHeader { IFF_VNET_HDR } else { 0 };
    let flags = IFF_TAP | IFF_NO_PI | header | more;
    // All flags are in the lower 16 bits; IFF_TUN_EXCL is bit 15.
    let mut request = InterfaceRequest { name: [0; 16], flags: flags as u16, unused: [0; 22] };
    let (_nul, room) = request.name.split_last_mut().ok_or(Errno::ENAMETOOLONG)?;
    room.get_mut(..name.len()).ok_or(Errno::ENAMETOOLONG)?.copy_from_slice(name.as_bytes());
    // SAFETY: the pointer is to a live value of ifreq's size, which the kernel reads and writes,
    // and which has no other reference. The descriptor is open during the call.
    unsafe { raw::tunsetiff(device.as_raw_fd(), &raw mut request) }.map(drop)
}
