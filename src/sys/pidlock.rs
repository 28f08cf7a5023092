//! Pid files with liveness locks: a process holds a POSIX lock on its file until it ends.
//!
//! POSIX record locks belong to a process and survive exec (fcntl(2)). The supervisor takes QEMU's
//! lock in the child before exec, so QEMU needs no writable directory for a pid file. `F_GETLK`
//! returns the holder's pid to any process. A killed process holds no lock, even before it is
//! reaped. The file's content is unused.
//!
//! The kernel releases the lock when its holder closes *any* descriptor of the file. So a holder
//! opens the file once, keeps it open, and never calls [`holder`] for it: that would return `None`
//! and release the lock. A compromised QEMU can release its lock too. It cannot leave its control
//! group.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Instant;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::pidfd::Process;
use crate::error::{Error, ErrorKind, IoContext, Result};

/// Opens the lock file `path` for the process that will hold it.
pub fn open(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW);
    options.open(path).at("open", path)
}

/// Locks the file for this process, until the returned file is closed.
///
/// # Errors
/// [`ErrorKind::Conflict`] if another process holds it.
pub fn lock_self(path: &Path) -> Result<File> {
    let file = open(path)?;
    match fcntl(&file, FcntlArg::F_SETLK(&whole_file(libc::F_WRLCK))) {
        Ok(_) => Ok(file),
        Err(nix::Error::EAGAIN | nix::Error::EACCES) => Err(Error::new(
            ErrorKind::Conflict,
            format!("'{}' is held by another process", path.display()),
        )),
        Err(errno) => Err(errno).at("lock", path),
    }
}

/// Returns the process that holds the lock, or `None` if no process does or the file does not
/// exist.
///
/// A process that ends releases its lock a moment before its last descriptors are closed. A caller
/// that needs those closed, such as QEMU's image locks before the next start, must wait for a
/// [`Process`].
///
/// # Errors
/// [`ErrorKind::Conflict`] if the holder has no pid in this pid namespace.
pub fn holder(path: &Path) -> Result<Option<Process>> {
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        file => file.at("open", path)?,
    };
    loop {
        let Some(pid) = holder_pid(&file, path)? else { return Ok(None) };
        // The holder may end and its pid be reused between the query and the open. That is excluded
        // if the same pid holds the lock before and after the open, and the opened process still
        // runs.
        let process = Process::find(pid)?;
        match process {
            Some(process)
                if holder_pid(&file, path)? == Some(pid)
                    && !process.wait_exit(Instant::now())? =>
            {
                return Ok(Some(process));
            }
            _ => {}
        }
    }
}

/// Returns the pid of the process that holds the lock on `file`, if any. `path` is for messages.
fn holder_pid(file: &impl AsFd, path: &Path) -> Result<Option<i32>> {
    let mut lock = whole_file(libc::F_WRLCK);
    fcntl(file, FcntlArg::F_GETLK(&mut lock)).at("ask for the lock on", path)?;
    if i32::from(lock.l_type) == libc::F_UNLCK {
        return Ok(None);
    }
    // fcntl(2): 0 stands for a process of another pid namespace, -1 for a lock of an open file
    // description.
    if lock.l_pid <= 0 {
        let message =
            format!("'{}' is held by a process outside this pid namespace", path.display());
        return Err(Error::new(ErrorKind::Conflict, message).hint(
            "run the CPI in the host's pid namespace; /proc/locks on the host lists the holder",
        ));
    }
    Ok(Some(lock.l_pid))
}

/// Returns whether process `pid` holds the lock on the open `file`.
pub(super) fn is_held_by(file: &File, pid: i32) -> Result<bool> {
    Ok(holder_pid(file, Path::new("pid file"))? == Some(pid))
}

/// Returns a lock of type `kind` on the whole file, as fcntl(2) takes it.
pub(super) fn whole_file(kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::*;

    #[test]
    fn holder_of_a_missing_file_is_none() {
        assert!(holder(Path::new("/nonexistent/qemu.pid")).unwrap().is_none());
    }

    #[test]
    fn holder_without_a_pid_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pid");
        let file = open(&path).unwrap();
        fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file(libc::F_WRLCK))).unwrap();
        assert_eq!(holder(&path).unwrap_err().kind(), ErrorKind::Conflict);
    }

    #[test]
    fn holder_is_returned_until_it_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pid");
        assert!(
            holder(&{
                drop(open(&path).unwrap());
                path.clone()
            })
            .unwrap()
            .is_none()
        );
        // Another program that takes POSIX locks: python's lockf is fcntl(F_SETLK).
        let script = format!(
            "import fcntl;f=open('{}','r+');fcntl.lockf(f,fcntl.LOCK_EX);\
             print(1,flush=True);input()",
            path.display()
        );
        let mut child = Command::new("python3")
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        let process = holder(&path).unwrap().expect("held");
        assert_eq!(process.pid(), child.id() as i32);
        assert_eq!(lock_self(&path).unwrap_err().kind(), ErrorKind::Conflict);
        process.signal(nix::sys::signal::Signal::SIGKILL).unwrap();
        assert!(process.wait_exit(Instant::now() + Duration::from_secs(10)).unwrap());
        assert!(holder(&path).unwrap().is_none(), "an unreaped child holds nothing");
        child.wait().unwrap();
    }
}
