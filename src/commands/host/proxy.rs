//! Forwards a call of a user other than root to a process of root behind bosh-qemu-cpi.socket, and
//! that process's answer back.

use std::fs::File;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::blocking_call::run_with_timeout;
use crate::config::Transport;
use crate::error::{Error, Result};
use crate::schema::Property;

/// How long to wait for a connection while the socket unit serves `MaxConnections` other calls.
const SOCKET_CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// Connects standard input and `output` with a new process of root that serves the call.
///
/// # Errors
/// If the socket does not exist, refuses this user or stays busy, and I/O errors.
pub(super) fn to_root(output: File) -> Result<()> {
    let socket = Transport::absent().expect("every key has a default").socket;
    let fail = |error| {
        let hint = "calls of a user other than root go through bosh-qemu-cpi.socket: as root, run \
                    'bosh-qemu-cpi host setup --user USER', which also adds the user to its group";
        Error::io("connect to", &socket, error).hint(hint)
    };
    let path = socket.clone();
    let connected = run_with_timeout(Instant::now() + SOCKET_CONNECT_TIMEOUT, move || {
        UnixStream::connect(path)
    });
    let root = connected.unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into())).map_err(fail)?;
    forward(io::stdin(), output, root).map_err(|e| Error::os("forward the answer", e))
}

/// Copies `input` to the `root` process and its answer to `output`, until that process ends or the
/// reader of `output` closes it.
fn forward(
    mut input: impl Read + Send + 'static,
    mut output: File,
    mut root: UnixStream,
) -> io::Result<()> {
    let (mut request, closing, answer) =
        (root.try_clone()?, root.try_clone()?, output.try_clone()?);
    std::thread::spawn(move || {
        let _ = io::copy(&mut input, &mut request);
        // The caller has sent everything, but may still read.
        let _ = request.shutdown(Shutdown::Write);
    });
    std::thread::spawn(move || {
        if let Ok(()) = wait_until_closed(&answer) {
            // Otherwise the root process would write its answer into the socket without an error,
            // and could not tell whether the caller received it.
            let _ = closing.shutdown(Shutdown::Both);
        }
    });
    // For a socket and a pipe of known types `io::copy` uses splice(2), which holds the pipe's lock
    // while it waits for data. The reader's close would block until then (`splice_file_to_pipe` in
    // the kernel's fs/splice.c). A trait object hides the type.
    let root: &mut dyn Read = &mut root;
    io::copy(root, &mut output).map(drop)
}

/// Waits until `output`, a pipe or a socket, has no reader.
fn wait_until_closed(output: &File) -> io::Result<()> {
    // poll(2) reports POLLERR and POLLHUP whatever events the caller asks for.
    let mut descriptors = [PollFd::new(output.as_fd(), PollFlags::empty())];
    loop {
        match poll(&mut descriptors, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => {}
            polled => return polled.map(drop).map_err(io::Error::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn a_caller_that_closes_its_end_closes_the_connection_to_root() {
        let (proxy, mut root) = UnixStream::pair().unwrap();
        // The caller keeps its input open and closes only the end that it reads.
        let (input, _caller_writes) = io::pipe().unwrap();
        let (caller_reads, output) = io::pipe().unwrap();
        let forwarding =
            std::thread::spawn(move || forward(input, File::from(OwnedFd::from(output)), proxy));
        // The caller received the greeting.
        root.write_all(b"x").unwrap();
        (&caller_reads).read_exact(&mut [0]).unwrap();
        drop(caller_reads);
        assert_eq!(root.read(&mut [0]).unwrap(), 0);
        assert_eq!(root.write_all(b"answer").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        forwarding.join().unwrap().unwrap();
    }
}
