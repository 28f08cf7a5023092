//! A filesystem that never answers, as NFS without its server: FUSE without a daemon.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A hung mount over a directory. Access blocks until this is dropped or the process is killed, as
/// with NFS.
pub struct HungFilesystem {
    at: PathBuf,
    /// The connection to the kernel, which nothing reads.
    _device: File,
}

impl HungFilesystem {
    /// Mounts over `at`, in the mount namespace that a
    /// [`Filesystem`](super::filesystem::Filesystem) has made for the test's thread. Prints why and
    /// returns `None` if this machine cannot.
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
