//! A filesystem that does not answer, as one whose server is gone: FUSE without anybody behind it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Hides a directory. Whoever touches it waits, until it is dropped or the waiting process is killed, as with NFS.
pub struct HungFilesystem {
    at: PathBuf,
    /// The kernel's end of the conversation that never begins.
    _device: File,
}

impl HungFilesystem {
    /// Over `at`, in a mount namespace that the test's thread has made, as
    /// [`Filesystem`](super::filesystem::Filesystem) does. `None`, with the reason told, where that can not be had.
    pub fn over(at: &Path) -> Option<Self> {
        let Ok(device) = File::options().read(true).write(true).open("/dev/fuse") else {
            super::skip("no /dev/fuse");
            return None;
        };
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        match mount(Some("silent"), at, Some("fuse"), MsFlags::empty(), Some(options.as_str())) {
            Ok(()) => Some(Self { at: at.to_owned(), _device: device }),
            Err(errno) => {
                super::skip(&format!("no FUSE: {errno}"));
                None
            }
        }
    }
}

impl Drop for HungFilesystem {
    fn drop(&mut self) {
        let _ = umount2(&self.at, MntFlags::MNT_DETACH);
    }
}
