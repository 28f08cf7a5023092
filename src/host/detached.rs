//! Starts a process that outlives this one and shares nothing with it, such as a supervisor.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use crate::blocking_call::run_with_timeout;
use crate::crash;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::pidfd::wait_readable;

/// How long to wait for a killed process: it exits at once, unless it hangs in the kernel.
const KILLED_EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// The reading end of a detached process's standard output. The process sends one line and then
/// closes it.
#[derive(Debug)]
pub struct Handshake {
    child: Child,
    stdout: ChildStdout,
}

/// Starts this program with `arguments`. Its standard input is `lock`, and its standard error is
/// appended to `log`. The new process must call [`crate::sys::detach::detach`], which leaves this
/// process's session and closes inherited descriptors.
pub fn spawn(arguments: &[OsString], lock: File, log: &Path) -> Result<Handshake> {
    let program = Path::new("/proc/self/exe");
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(log)
        .at("open", log)?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command.envs(crash::environment());
    let mut child =
        command.stdin(lock).stdout(Stdio::piped()).stderr(log).spawn().at("run", program)?;
    crash::point!("supervisor spawned");
    let stdout = child.stdout.take().expect("standard output is piped");
    Ok(Handshake { child, stdout })
}

impl Handshake {
    /// Returns the line, or `None` if the process ended without one.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] at `deadline`; the process is killed then.
    pub fn read_line(mut self, deadline: Instant) -> Result<Option<String>> {
        let pid = self.child.id();
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            let ready = wait_readable(&self.stdout, deadline);
            if !ready.map_err(|e| Error::os(format!("wait for process {pid}"), e))? {
                // The process may hang before it locks its pid file, so no other call could find
                // it.
                self.child.kill().map_err(|e| Error::os(format!("end process {pid}"), e))?;
                // A process that hangs in the kernel ends when its storage answers, so this does
                // not wait for it.
                run_with_timeout(Instant::now() + KILLED_EXIT_TIMEOUT, move || self.child.wait());
                let message =
                    format!("supervisor process {pid} did not start the VM before the deadline");
                return Err(Error::new(ErrorKind::Timeout, message).hint(
                    "see the VM's qemu.log and supervisor.log; \
                     on a busy host, raise the method's deadline in `deadlines`",
                ));
            }
            let mut chunk = [0; 4096];
            match self.stdout.read(&mut chunk) {
                Ok(0) => return Ok(None),
                Ok(length) => line.extend_from_slice(&chunk[..length]),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(Error::os(format!("read the result of process {pid}"), error));
                }
            }
        }
        Ok(Some(String::from_utf8_lossy(&line).into_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handshake(script: &str) -> (Handshake, crate::sys::pidfd::Process) {
        let mut child =
            Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        let process = crate::sys::pidfd::Process::open(child.id() as i32).unwrap();
        (Handshake { child, stdout }, process)
    }

    fn says(script: &str, timeout: Duration) -> Result<Option<String>> {
        let (handshake, process) = handshake(script);
        let line = handshake.read_line(Instant::now() + timeout);
        if line.is_ok() {
            process.signal(nix::sys::signal::Signal::SIGKILL).unwrap();
            nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(process.pid()), None).unwrap();
        }
        assert!(process.wait_exit(Instant::now()).unwrap(), "a process that is late is killed");
        line
    }

    #[test]
    fn read_line_distinguishes_line_exit_and_timeout() {
        let timeout = Duration::from_secs(20);
        // The process keeps running: its line is read without waiting for its end.
        assert_eq!(
            says("printf '{\"a\":'; echo '1}'; exec sleep 60", timeout).unwrap().unwrap(),
            "{\"a\":1}\n"
        );
        assert_eq!(says("printf half", timeout).unwrap(), None);
        assert_eq!(
            says("exec sleep 60", Duration::from_millis(50)).unwrap_err().kind(),
            ErrorKind::Timeout
        );
    }
}
