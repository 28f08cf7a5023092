//! Signal dispositions: inherited ones that this program must reset, and those that it sets.

use nix::sys::signal::{SigHandler, Signal, signal};

use crate::error::{Error, Result};

/// Resets SIGCHLD to its default, so that this process can read the exit statuses of its children.
///
/// An ignored SIGCHLD is inherited through exec. The kernel then discards exit statuses, and
/// waitpid(2) answers ECHILD. A supervisor would mistake a guest's poweroff for a crash and start
/// the VM again. Must be called before this process waits for a child.
#[allow(unsafe_code)]
pub fn keep_exit_statuses() -> Result<()> {
    // SAFETY: the default action runs no code of this process.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }
        .map(drop)
        .map_err(|errno| Error::os("stop ignoring SIGCHLD", errno))
}

/// Ignores SIGXFSZ, so that a write beyond a file size limit fails with EFBIG. Children inherit
/// that.
#[allow(unsafe_code)]
pub(super) fn ignore_file_size_signal() -> Result<()> {
    // SAFETY: ignoring a signal runs no code of this process.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }
        .map(drop)
        .map_err(|errno| Error::os("ignore SIGXFSZ", errno))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Signal dispositions belong to the whole process, so the next test runs this one in a process
    /// of its own.
    #[test]
    #[ignore = "run by keep_exit_statuses_resets_an_ignored_sigchld in a process of its own"]
    #[allow(unsafe_code)]
    fn alone() {
        // SAFETY: ignoring a signal runs no code of this process.
        unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }.unwrap();
        let lost = Command::new("true").spawn().unwrap().wait();
        assert_eq!(
            lost.unwrap_err().raw_os_error(),
            Some(nix::libc::ECHILD),
            "exit statuses are discarded before the reset"
        );
        keep_exit_statuses().unwrap();
        assert!(Command::new("true").spawn().unwrap().wait().unwrap().success());
    }

    #[test]
    fn keep_exit_statuses_resets_an_ignored_sigchld() {
        let program = std::env::current_exe().unwrap();
        let arguments = ["--exact", "sys::signals::tests::alone", "--ignored"];
        let ran = Command::new(program).args(arguments).output().unwrap();
        let output = String::from_utf8_lossy(&ran.stdout);
        assert!(ran.status.success() && output.contains("1 passed"), "{output}");
    }
}
