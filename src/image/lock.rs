//! Whether a QEMU has an image open, by the locks it takes on the file itself: they tell also of one that no record of
//! ours knows.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::error::{Error, ErrorKind, IoContext, Result};

/// QEMU, and so `qemu-img`, locks bytes of these for as long as it has an image open: `RAW_LOCK_PERM_BASE` is 100 and
/// `RAW_LOCK_SHARED_BASE` 200, both with less than 100 bits (block/file-posix.c).
const LOCK_BYTES: (libc::off_t, libc::off_t) = (100, 200);
const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Waits until no QEMU has the image open, at most until `deadline`: one that dies has it a moment longer than it seems
/// to live. An image that is not there is nobody's.
///
/// # Errors
/// [`ErrorKind::Conflict`].
pub fn wait_unlocked(path: &Path, deadline: Instant) -> Result<()> {
    let image = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        image => image.at("open", path)?,
    };
    // Where the filesystem knows no locks, QEMU does without them, too.
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

/// Whether no QEMU has the image open, on any of the hosts that reach it.
///
/// # Errors
/// [`ErrorKind::Conflict`] if one has it; [`ErrorKind::Host`] if that can not be told, because another host's word for it is
/// all there is.
pub fn ensure_unlocked(path: &Path) -> Result<()> {
    let image = File::open(path).at("open", path)?;
    match is_locked(&image) {
        Ok(false) => Ok(()),
        Ok(true) => Err(Error::new(ErrorKind::Conflict, format!("image '{}' is open in a QEMU", path.display()))
            .hint("the host where that runs lives: detach the disk there")),
        Err(error) => Err(Error::io("ask for the locks of", path, error)
            .hint("another host may have it open: see to the locks of its filesystem (`rpcinfo`, for NFS 3) first")),
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
    use super::*;

    #[test]
    fn a_lock_like_qemus_tells_that_an_image_is_in_use() {
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
        // Nobody's business.
        lock(0, libc::F_WRLCK);
        wait_unlocked(&path, Instant::now()).unwrap();
        ensure_unlocked(&path).unwrap();
    }
}
