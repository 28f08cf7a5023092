//! What a supervisor does first: leave its caller.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use nix::libc;

use crate::error::{Error, IoContext, Result};

/// Leaves the caller's session, process group, directory and wish to ignore children, and closes every descriptor it may
/// have left open, but for the standard streams. Answers what standard input and output were: a lock
/// that is held as long as it is open, and the pipe on which a starter waits.
///
/// A Director reads its CPI's standard streams to their end: one descriptor kept here would hang its call as long as
/// the VM lives. Must be called before anything is opened.
pub fn detach() -> Result<(File, File)> {
    close_inherited()?;
    super::signals::keep_exit_statuses()?;
    // Fails only for a leader of a process group, which has left already.
    let _ = nix::unistd::setsid();
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    let root = std::path::Path::new("/");
    nix::unistd::chdir(root).at("change to", root)?;
    let stdin = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|e| Error::os("copy standard input", e))?;
    let stdout = std::io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|e| Error::os("copy standard output", e))?;
    let null = std::path::Path::new("/dev/null");
    let null = std::fs::OpenOptions::new().read(true).write(true).open(null).at("open", null)?;
    nix::unistd::dup2_stdout(&null).map_err(|e| Error::os("give up standard output", e))?;
    nix::unistd::dup2_stdin(OwnedFd::from(null))
        .map_err(|e| Error::os("give up standard input", e))?;
    Ok((File::from(stdin), File::from(stdout)))
}

#[allow(unsafe_code)]
fn close_inherited() -> Result<()> {
    // SAFETY: the caller promises that nothing of this process has opened a descriptor yet, so no owner is left with a
    // number that means something else.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
    if closed == 0 {
        Ok(())
    } else {
        Err(Error::os("close inherited descriptors", std::io::Error::last_os_error()))
    }
}
