//! Programs that end together with the call that runs them.

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};

/// Has the kernel kill the program when the thread that starts it ends. Otherwise it would outlive
/// a killed call and occupy the space of files that another call removes. The thread must wait for
/// the program.
#[allow(unsafe_code)]
pub fn kill_with_parent(command: &mut Command) {
    let parent = Pid::this();
    // SAFETY: between fork and exec only async-signal-safe calls are allowed. prctl(2) and
    // getppid(2) are called directly, and nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            set_pdeathsig(Signal::SIGKILL)?;
            // The parent may have ended before the line above took effect.
            if getppid() == parent { Ok(()) } else { Err(Errno::ESRCH.into()) }
        })
    };
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::Stdio;

    use super::*;

    #[test]
    fn kill_with_parent_ends_the_program_with_its_thread() {
        let mut child = std::thread::spawn(|| {
            let mut command = Command::new("cat");
            kill_with_parent(&mut command);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
        })
        .join()
        .unwrap();
        // Its output ends although its standard input is open.
        let mut output = String::new();
        child.stdout.take().unwrap().read_to_string(&mut output).unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&child.wait().unwrap()), Some(9));
    }
}
