//! A caller who is not root here: root answers, in a process of its own behind a socket.

use std::fs::File;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::config::Transport;
use crate::error::{Error, Result};
use crate::schema::Property;
use crate::timeout::run_with_timeout;

/// How long a caller waits for its turn, where as many are answered as the socket's unit allows.
const TURN: Duration = Duration::from_secs(30);

/// Has another process of this host, which is root's, answer in place of this one.
pub(super) fn to_root(output: File) -> Result<()> {
    let socket = Transport::absent().expect("every key has a default").socket;
    let fail = |error| {
        let hint =
            "calls of users who are not root need bosh-qemu-cpi.socket, and the user in its group";
        Error::io("connect to", &socket, error).hint(hint)
    };
    let path = socket.clone();
    let connected = run_with_timeout(Instant::now() + TURN, move || UnixStream::connect(path));
    let host = connected.unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into())).map_err(fail)?;
    join(io::stdin(), output, host).map_err(|e| Error::os("pass on the answer", e))
}

/// Passes on to `host` what is heard on `input`, and to `output` what it says, until it or who listens there is gone.
fn join(
    mut input: impl Read + Send + 'static,
    mut output: File,
    mut host: UnixStream,
) -> io::Result<()> {
    let (mut caller, end, heard) = (host.try_clone()?, host.try_clone()?, output.try_clone()?);
    std::thread::spawn(move || {
        let _ = io::copy(&mut input, &mut caller);
        // It has no more to say, and may listen yet.
        let _ = caller.shutdown(Shutdown::Write);
    });
    std::thread::spawn(move || {
        if let Ok(()) = closed(&heard) {
            // Or the host would answer into nothing, and take its answer for one that may have been heard.
            let _ = end.shutdown(Shutdown::Both);
        }
    });
    // Of what it knows to be a socket and a pipe, `io::copy` makes splice(2), which has the pipe's lock while nothing comes:
    // nobody could close the other end until then (`splice_file_to_pipe` in fs/splice.c).
    let host: &mut dyn Read = &mut host;
    io::copy(host, &mut output).map(drop)
}

/// Waits until nobody can read any more what is written to `output`.
fn closed(output: &File) -> io::Result<()> {
    // Of a pipe without readers, and of a socket whose other end is gone, that is said whatever is asked for.
    let mut asked = [PollFd::new(output.as_fd(), PollFlags::empty())];
    loop {
        match poll(&mut asked, PollTimeout::NONE) {
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
    fn a_caller_that_is_gone_is_so_for_the_process_that_answers() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        // It has more to say for all that anybody knows, and hears no more.
        let (input, _speaks) = io::pipe().unwrap();
        let (hears, output) = io::pipe().unwrap();
        let joined =
            std::thread::spawn(move || join(input, File::from(OwnedFd::from(output)), ours));
        // The greeting was heard.
        theirs.write_all(b"x").unwrap();
        (&hears).read_exact(&mut [0]).unwrap();
        drop(hears);
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        assert_eq!(theirs.write_all(b"answer").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        joined.join().unwrap().unwrap();
    }
}
