//! Starting a process that outlives this one and shares nothing with it.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::Instant;

use crate::error::{Error, ErrorKind, IoContext, Result};

/// The reading end of a detached process's standard output, on which it sends one line before it gives it up.
#[derive(Debug)]
pub struct Handshake {
    child: Child,
    stdout: ChildStdout,
}

/// Starts this program with `arguments`, its standard error appended to `log`, `lock` as its standard input. It leaves our session and closes what it
/// inherited by [`crate::sys::detach::detach`].
pub fn spawn(arguments: &[OsString], lock: File, log: &Path) -> Result<Handshake> {
    let program = Path::new("/proc/self/exe");
    let log = std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(log).at("open", log)?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let mut child = command.stdin(lock).stdout(Stdio::piped()).stderr(log).spawn().at("run", program)?;
    let stdout = child.stdout.take().expect("standard output is piped");
    Ok(Handshake { child, stdout })
}

impl Handshake {
    /// The line, or `None` if the process ended without one.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] at `deadline`.
    pub fn line(self, deadline: Instant) -> Result<Option<String>> {
        let Self { mut child, stdout } = self;
        let pid = child.id();
        let (sender, receiver) = mpsc::channel();
        // read(2) on a pipe knows no timeout; the thread ends with the pipe or with this process.
        std::thread::spawn(move || {
            let mut line = String::new();
            let _ = BufReader::new(stdout).read_line(&mut line);
            let _ = sender.send(line);
        });
        match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) if line.ends_with('\n') => Ok(Some(line)),
            Ok(_) => Ok(None),
            Err(_) => {
                // It may hang before it has taken the lock by which others would find it.
                let ended = child.kill().and_then(|()| child.wait());
                ended.map_err(|e| Error::os(format!("end process {pid}"), e))?;
                Err(Error::new(ErrorKind::Timeout, format!("process {pid} did not say in time how its start went")))
            }
        }
    }
}
