//! A tmpfs that a test can fill, grow and make read-only.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A mounted tmpfs. It counts pages of 4 KiB: a file of one byte takes a page.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// Mounts a tmpfs of `mib` MiB on `at`.
    pub fn mount(at: PathBuf, mib: u32) -> Self {
        let options = format!("size={mib}m,mode=0700");
        mount(Some("tmpfs"), &at, Some("tmpfs"), MsFlags::empty(), Some(options.as_str())).unwrap();
        Self(at)
    }

    /// Changes its size to `mib` MiB.
    pub fn grow(&self, mib: u32) {
        let options = format!("size={mib}m");
        mount(Some("tmpfs"), &self.0, Some("tmpfs"), MsFlags::MS_REMOUNT, Some(options.as_str()))
            .unwrap();
    }

    /// Remounts it read-only or writable. Read-only fails while a file is open for writing.
    pub fn read_only(&self, is: bool) {
        let flags = if is { MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY } else { MsFlags::MS_REMOUNT };
        mount(Some("tmpfs"), &self.0, Some("tmpfs"), flags, None::<&str>).unwrap();
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }

    /// Fills it, except for `free_pages` pages.
    pub fn fill(&self, free_pages: u64) {
        let mut ballast = File::options().create(true).append(true).open(self.ballast()).unwrap();
        while ballast.write_all(&[1; 4096]).is_ok() {}
        let size = ballast.metadata().unwrap().len();
        ballast
            .set_len((size / 4096).checked_sub(free_pages).expect("that much ballast") * 4096)
            .unwrap();
    }

    /// Reverts [`Self::fill`].
    pub fn empty(&self) {
        fs::remove_file(self.ballast()).unwrap();
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // A process of a failed test may still use it, so the unmount is lazy.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
