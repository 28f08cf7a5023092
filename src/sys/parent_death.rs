//! Programs that end with the call that runs them.

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};

/// Has the kernel kill the program when the thread that starts it ends: one that goes on after a killed call holds space of
/// files that are removed meanwhile. The thread must wait for it.
#[allow(unsafe_code)]
pub fn kill_with_parent(command: &mut Command) {
    let us = Pid::this();
    // SAFETY: between fork and exec only async-signal-safe calls are allowed: prctl(2) and getppid(2) are made directly,
    // and nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            set_pdeathsig(Signal::SIGKILL)?;
            // Killed before the line above took effect.
            if getppid() == us { Ok(()) } else { Err(Errno::ESRCH.into()) }
        })
    };
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::Stdio;

    use super::*;

    #[test]
    fn a_program_ends_with_the_thread_that_started_it() {
        let mut child = std::thread::spawn(|| {
            let mut command = Command::new("cat");
            kill_with_parent(&mut command);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
        })
        .join()
        .unwrap();
        // Its standard input is open, and still its output ends.
        let mut said = String::new();
        child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&child.wait().unwrap()), Some(9));
    }
}
