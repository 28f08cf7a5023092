//! Liveness by the kernel's word: a process holds a POSIX lock on a file for as long as it lives.
//!
//! POSIX record locks belong to the process and survive exec (fcntl(2)), so QEMU holds one that the launcher took in
//! its child before exec, and needs no directory of its own to write a pid file in. `F_GETLK` tells anybody who the
//! holder is; a killed process, reaped or not, holds nothing. The file's contents mean nothing.
//!
//! The lock goes when its holder closes *any* descriptor of the file. So a holder opens it once and keeps it, and never
//! asks [`holder`] about it: the answer would be nobody, and then true. A QEMU that a guest broke out of can let go of
//! its lock too; what it can not leave is its control group.

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

/// Takes the lock for this process; it is held as long as the returned file is open.
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

/// The process that holds the lock, or `None` if none does or the file is not there.
///
/// A dying process lets go of its lock an instant before its last descriptors are closed: who needs those, as the next
/// start needs QEMU's image locks, waits for a [`Process`] it knows.
///
/// # Errors
/// [`ErrorKind::Conflict`] if something holds it that has no process number here.
pub fn holder(path: &Path) -> Result<Option<Process>> {
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        file => file.at("open", path)?,
    };
    loop {
        let Some(pid) = holder_pid(&file, path)? else { return Ok(None) };
        // The holder may end, and its number be given to another, between asking and opening; not if the number
        // holds the lock on both sides of it and what was opened lives still.
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

fn holder_pid(file: &impl AsFd, path: &Path) -> Result<Option<i32>> {
    let mut lock = whole_file(libc::F_WRLCK);
    fcntl(file, FcntlArg::F_GETLK(&mut lock)).at("ask for the lock on", path)?;
    if i32::from(lock.l_type) == libc::F_UNLCK {
        return Ok(None);
    }
    // fcntl(2): 0 is a process of another pid namespace, -1 a lock that no process but an open file holds.
    if lock.l_pid <= 0 {
        let message =
            format!("'{}' is held by a process that can not be seen from here", path.display());
        return Err(Error::new(ErrorKind::Conflict, message).hint(
            "run the CPI in the host's pid namespace; /proc/locks on the host lists the holder",
        ));
    }
    Ok(Some(lock.l_pid))
}

/// Whether process `pid` holds the lock on the open `file`.
pub(super) fn is_held_by(file: &File, pid: i32) -> Result<bool> {
    Ok(holder_pid(file, Path::new("pid file"))? == Some(pid))
}

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
    fn nobody_holds_a_file_that_is_not_there() {
        assert!(holder(Path::new("/nonexistent/qemu.pid")).unwrap().is_none());
    }

    #[test]
    fn a_holder_without_a_number_is_an_error_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pid");
        let file = open(&path).unwrap();
        fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file(libc::F_WRLCK))).unwrap();
        assert_eq!(holder(&path).unwrap_err().kind(), ErrorKind::Conflict);
    }

    #[test]
    fn the_holder_is_known_until_it_is_killed() {
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
        // A stranger that takes POSIX locks: python's lockf is fcntl(F_SETLK).
        let script = format!(
            "import fcntl;f=open('{}','r+');fcntl.lockf(f,fcntl.LOCK_EX);print(1,flush=True);input()",
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
