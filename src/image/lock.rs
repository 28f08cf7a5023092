//! QEMU's image locks: whether a QEMU has an image file open. They also reveal a QEMU that no
//! record names.

use std::os::fd::AsFd;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::error::{Error, ErrorKind, Result};
use crate::store::beneath::{self, Expected};

/// Start and length of the byte range that QEMU, and so `qemu-img`, locks while it has an image
/// open: `RAW_LOCK_PERM_BASE` is 100 and `RAW_LOCK_SHARED_BASE` 200, each followed by fewer than
/// 100 bits (block/file-posix.c).
const LOCK_BYTES: (libc::off_t, libc::off_t) = (100, 200);
/// Time between two checks whether an image is locked.
const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Waits until no QEMU has the image open. A QEMU that was killed releases its lock a moment after
/// its process has vanished. A missing image counts as unlocked.
///
/// # Errors
/// [`ErrorKind::Conflict`] if a QEMU still has the image open at `deadline`.
pub fn wait_unlocked(path: &Path, deadline: Instant) -> Result<()> {
    let Some(image) = beneath::find(path, Expected::Own)? else { return Ok(()) };
    let image = image.read()?;
    // On a filesystem without locks QEMU takes none either.
    while is_locked(&image).unwrap_or(false) {
        if Instant::now() >= deadline {
            let message =
                format!("image '{}' is open in a QEMU that no record names", path.display());
            return Err(Error::new(ErrorKind::Conflict, message).hint(format!(
                "`fuser -v {}` shows its process; end that and repeat the call",
                path.display()
            )));
        }
        sleep(LOCK_POLL_INTERVAL);
    }
    Ok(())
}

/// Fails if a QEMU on any host that shares the file has the image open.
///
/// # Errors
/// [`ErrorKind::Conflict`] if one has; [`ErrorKind::Host`] if the filesystem cannot answer for the
/// other hosts.
pub fn ensure_unlocked(path: &Path) -> Result<()> {
    let image = beneath::file(path, Expected::Own)?.read()?;
    match is_locked(&image) {
        Ok(false) => Ok(()),
        Ok(true) => Err(Error::new(
            ErrorKind::Conflict,
            format!("image '{}' is open in a QEMU", path.display()),
        )
        .hint("find the host that runs this QEMU and detach the disk there")),
        Err(error) => Err(Error::io("query the locks of", path, error).hint(
            "another host may have the image open: repair the locks of its filesystem first \
             (for NFS 3, see `rpcinfo`)",
        )),
    }
}

fn is_locked(image: &impl AsFd) -> std::io::Result<bool> {
    let (l_start, l_len) = LOCK_BYTES;
    let (l_type, l_whence) = (libc::F_WRLCK as i16, libc::SEEK_SET as i16);
    let mut lock = libc::flock { l_type, l_whence, l_start, l_len, l_pid: 0 };
    fcntl(image, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn image_locked_as_qemu_locks_it_is_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        wait_unlocked(&path, Instant::now()).unwrap();
        let qemu = File::create_new(&path).unwrap();
        wait_unlocked(&path, Instant::now()).unwrap();
        let lock = |byte, kind| {
            let (l_type, l_whence) = (kind as i16, libc::SEEK_SET as i16);
            let lock = libc::flock { l_type, l_whence, l_start: byte, l_len: 1, l_pid: 0 };
            fcntl(&qemu, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
        };
        for byte in [100, 203] {
            lock(byte, libc::F_WRLCK);
            let error = wait_unlocked(&path, Instant::now()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Conflict);
            assert!(error.report().contains("image' is open"), "{}", error.report());
            assert_eq!(ensure_unlocked(&path).unwrap_err().kind(), ErrorKind::Conflict);
            lock(byte, libc::F_UNLCK);
        }
        // A lock outside QEMU's range does not count.
        lock(0, libc::F_WRLCK);
        wait_unlocked(&path, Instant::now()).unwrap();
        ensure_unlocked(&path).unwrap();
    }
}
