//! What a process inherits about signals and must not keep.

use nix::sys::signal::{SigHandler, Signal, signal};

use crate::error::{Error, Result};

/// Lets this process learn how its children ended, whatever its starter wanted for itself.
///
/// SIGCHLD ignored is inherited through exec, and makes the kernel throw away exit statuses: waitpid(2) then answers
/// ECHILD. A supervisor would take a guest that powered itself off for a crashed one, and start it again. To be called
/// before anything waits for a child.
#[allow(unsafe_code)]
pub fn keep_exit_statuses() -> Result<()> {
    // SAFETY: the default action runs no code of this process.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }
        .map(drop)
        .map_err(|errno| Error::os("stop ignoring SIGCHLD", errno))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Signal dispositions belong to the whole process, so this runs alone in one: see below.
    #[test]
    #[ignore = "run by a_starter_that_ignores_its_children_is_not_copied in a process of its own"]
    #[allow(unsafe_code)]
    fn alone() {
        // SAFETY: ignoring a signal runs no code of this process.
        unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }.unwrap();
        let lost = Command::new("true").spawn().unwrap().wait();
        assert_eq!(
            lost.unwrap_err().raw_os_error(),
            Some(nix::libc::ECHILD),
            "or there is nothing to mend"
        );
        keep_exit_statuses().unwrap();
        assert!(Command::new("true").spawn().unwrap().wait().unwrap().success());
    }

    #[test]
    fn a_starter_that_ignores_its_children_is_not_copied() {
        let program = std::env::current_exe().unwrap();
        let arguments = ["--exact", "sys::signals::tests::alone", "--ignored"];
        let ran = Command::new(program).args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&ran.stdout);
        assert!(ran.status.success() && said.contains("1 passed"), "{said}");
    }
}
