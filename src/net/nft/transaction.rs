//! Sends a batch to the kernel, which carries out all of it or nothing.
//!
//! A batch is one message, however long. With a thousand VMs it has several hundred kilobytes, more
//! than a socket takes by default (`net.core.wmem_default`), so the socket's buffers are sized for
//! it. nfnetlink carries out a batch before the send returns, and all its answers are in the socket
//! then.

use std::io;
use std::os::fd::AsFd;

use netlink_bindings::builtin::NlmsgerrAttrs;
use netlink_bindings::nftables::ChainedFinal;
use netlink_bindings::traits::NetlinkChained;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};

/// An error of the kernel, with its message if it sent one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{errno}{}", .message.as_ref().map(|message| format!(": {message}")).unwrap_or_default())]
pub(super) struct KernelError {
    pub errno: Errno,
    pub message: Option<String>,
}

/// Memory that one answer takes in a socket: the kernel counts whole buffers.
const ACK_BUFFER: usize = 2048;

/// `struct nlmsghdr`.
const HEADER: usize = 16;

/// Sends `batch` and returns the first error, if any.
pub(super) fn send(batch: &ChainedFinal<'_>) -> Result<(), KernelError> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    // Answers carry a text, and do not repeat the request.
    socket.set_ext_ack(true).and_then(|()| socket.set_cap_ack(true))?;
    socket.bind_auto()?;
    let bytes = batch.payload();
    size_buffers(&socket, bytes.len(), batch.chain_len() * ACK_BUFFER)?;
    let sent = socket.send(bytes, 0)?;
    debug_assert_eq!(sent, bytes.len(), "a datagram is sent whole");
    let (mut first, mut answers) = (None, 0);
    let mut buffer = Vec::with_capacity(8192);
    loop {
        buffer.clear();
        match socket.recv(&mut buffer, libc::MSG_DONTWAIT) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error.into()),
        }
        for answer in parse_acks(&buffer) {
            answers += 1;
            first = first.or(answer.err());
        }
    }
    match first {
        Some(error) => Err(error),
        None if answers == 0 => Err(KernelError {
            errno: Errno::EPROTO,
            message: Some("the kernel sent no answer".into()),
        }),
        None => Ok(()),
    }
}

fn size_buffers(socket: &Socket, sent: usize, received: usize) -> nix::Result<()> {
    // The kernel keeps a little of it for itself, and doubles both.
    setsockopt(&socket.as_fd(), sockopt::SndBufForce, &(sent + 4096))?;
    setsockopt(&socket.as_fd(), sockopt::RcvBufForce, &(received + 4096))
}

impl From<io::Error> for KernelError {
    fn from(error: io::Error) -> Self {
        Self { errno: error.raw_os_error().map_or(Errno::EIO, Errno::from_raw), message: None }
    }
}

impl From<Errno> for KernelError {
    fn from(errno: Errno) -> Self {
        Self { errno, message: None }
    }
}

/// Returns the answers in `bytes`; skips messages of other types.
fn parse_acks(mut bytes: &[u8]) -> Vec<Result<(), KernelError>> {
    let mut answers = Vec::new();
    while let Some((message, rest)) = split_message(bytes) {
        bytes = rest;
        let (kind, flags) = (header_number::<2>(message, 4), header_number::<2>(message, 6));
        let Some(code) =
            message.get(HEADER..HEADER + 4).filter(|_| kind == libc::NLMSG_ERROR as u32)
        else {
            continue;
        };
        let code = i32::from_ne_bytes(code.try_into().expect("four bytes"));
        let attributes =
            message.get(2 * HEADER + 4..).filter(|_| flags & libc::NLM_F_ACK_TLVS as u32 != 0);
        let message = attributes.and_then(|bytes| NlmsgerrAttrs::new(bytes).get_msg().ok());
        let message = message.map(|text| text.to_string_lossy().into_owned());
        answers.push(if code == 0 {
            Ok(())
        } else {
            Err(KernelError { errno: Errno::from_raw(-code), message })
        });
    }
    answers
}

/// Splits `bytes` into the first message and the rest.
fn split_message(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = bytes.get(..4).map(|_| header_number::<4>(bytes, 0) as usize)?;
    let message = bytes.get(..length).filter(|message| message.len() >= HEADER)?;
    Some((message, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// Reads a number of `N` bytes at `at` from a header of at least [`HEADER`] bytes, in the host's
/// byte order.
fn header_number<const N: usize>(bytes: &[u8], at: usize) -> u32 {
    let mut whole = [0; 4];
    let start = if cfg!(target_endian = "big") { 4 - N } else { 0 };
    whole[start..start + N].copy_from_slice(&bytes[at..at + N]);
    u32::from_ne_bytes(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Builds an answer of the kernel with `code`, and a text if given.
    fn answer(code: i32, text: Option<&str>) -> Vec<u8> {
        let mut body = code.to_ne_bytes().to_vec();
        body.extend([0; HEADER]);
        if let Some(text) = text {
            body.extend((text.len() as u16 + 5).to_ne_bytes());
            body.extend(1u16.to_ne_bytes());
            body.extend(text.bytes().chain([0]));
        }
        let mut message = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        message.extend((libc::NLMSG_ERROR as u16).to_ne_bytes());
        message.extend(if text.is_some() { libc::NLM_F_ACK_TLVS as u16 } else { 0 }.to_ne_bytes());
        message.extend([0; 8]);
        message.extend(body);
        message.resize(message.len().next_multiple_of(4), 0);
        message
    }

    #[test]
    fn answers_are_successes_or_errors_with_the_kernels_message() {
        let bytes = [
            answer(0, None),
            answer(-libc::ENOENT, None),
            answer(-libc::EINVAL, Some("no such hook")),
        ]
        .concat();
        let [done, plain, with_text] = parse_acks(&bytes).try_into().unwrap();
        assert_eq!(done, Ok(()));
        assert_eq!(plain, Err(KernelError { errno: Errno::ENOENT, message: None }));
        assert_eq!(with_text.unwrap_err().to_string(), "EINVAL: Invalid argument: no such hook");
    }

    #[test]
    fn a_truncated_message_is_no_answer() {
        let whole = answer(0, None);
        for length in 0..whole.len() {
            assert_eq!(parse_acks(&whole[..length]), [], "{length}");
        }
    }
}
