//! Detaches a process from its caller; the first action of a supervisor.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use nix::libc;

use crate::error::{Error, IoContext, Result};

/// Leaves the caller's session, process group and working directory, restores SIGCHLD, and closes
/// all inherited descriptors except the standard streams.
///
/// Returns the former standard input, which is a lock held until it is closed, and the former
/// standard output, which is the pipe on which the caller waits.
///
/// A Director reads its CPI's standard streams to their end. A descriptor that stays open here
/// would block the Director's call until the VM ends. Must be called before this process opens any
/// descriptor.
pub fn detach() -> Result<(File, File)> {
    close_inherited()?;
    super::signals::keep_exit_statuses()?;
    // Fails only for the leader of a process group, which already left its caller's group.
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
    nix::unistd::dup2_stdout(&null).map_err(|e| Error::os("replace standard output", e))?;
    nix::unistd::dup2_stdin(OwnedFd::from(null))
        .map_err(|e| Error::os("replace standard input", e))?;
    Ok((File::from(stdin), File::from(stdout)))
}

#[allow(unsafe_code)]
fn close_inherited() -> Result<()> {
    // SAFETY: the caller of `detach` guarantees that this process has not opened a descriptor yet.
    // So no object owns a descriptor that this call closes.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
    if closed == 0 {
        Ok(())
    } else {
        Err(Error::os("close inherited descriptors", std::io::Error::last_os_error()))
    }
}
