//! Raw Ethernet frames on a link (packet(7)).
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrLike, bind, recv, send, socket,
};

/// Longer frames are truncated to this many bytes.
const MAX_FRAME_BYTES: usize = 2048;

/// A socket that sends and receives whole frames on one link. It belongs to the network namespace
/// of the thread that opened it.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Opens a socket for frames of all types on the link `name`, including those that the host
    /// itself sends.
    ///
    /// # Errors
    /// ENODEV if there is no such link, EPERM without CAP_NET_RAW.
    pub fn open(name: &str) -> nix::Result<Self> {
        let index = if_nametoindex(name)?;
        // Without a protocol until it is bound, so that it never receives another link's frames.
        let socket = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )?;
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
            sll_ifindex: index as i32,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: the pointer is to a live sockaddr_ll, its length is given, and it is copied.
        let address = unsafe {
            LinkAddr::from_raw(
                (&raw const address).cast(),
                Some(size_of::<libc::sockaddr_ll>() as u32),
            )
        };
        bind(socket.as_raw_fd(), &address.ok_or(Errno::EINVAL)?)?;
        Ok(Self(socket))
    }

    /// Sends a frame: destination, source, type, payload.
    ///
    /// # Errors
    /// ENETDOWN if the link is down, ENOBUFS if its queue is full.
    pub fn send(&self, frame: &[u8]) -> nix::Result<()> {
        send(self.0.as_raw_fd(), frame, MsgFlags::empty()).map(drop)
    }

    /// Returns the next frame, or `None` if none arrives until `deadline`.
    ///
    /// # Errors
    /// ENETDOWN if the link goes down.
    pub fn receive(&self, deadline: Instant) -> nix::Result<Option<Vec<u8>>> {
        let mut frame = vec![0; MAX_FRAME_BYTES];
        loop {
            match recv(self.0.as_raw_fd(), &mut frame, MsgFlags::empty()) {
                Ok(length) => {
                    frame.truncate(length);
                    return Ok(Some(frame));
                }
                Err(Errno::EAGAIN) => {}
                Err(error) => return Err(error),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            // Rounded up: poll(2) with zero milliseconds would not wait, and this loop would spin.
            let left =
                PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], left) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
    }
}
