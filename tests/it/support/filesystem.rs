//! Filesystem of one test. Only the thread of the test and its child processes see the mount.

use std::path::Path;
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use tempfile::{NamedTempFile, TempDir};

/// A mounted filesystem. Create it before the [`Host`](super::host::Host) that uses it, so that it
/// is dropped after the host.
pub struct Filesystem(TempDir, Option<NamedTempFile>);

impl Filesystem {
    /// Mounts a tmpfs of `mib` MiB. Prints why and returns `None` if this machine cannot.
    pub fn new(mib: u64) -> Option<Self> {
        let filesystem = Self::unmounted()?;
        filesystem.mount(mib);
        Some(filesystem)
    }

    /// Mounts a filesystem of `mib` MiB, at least 300, in which files can share blocks. Prints why
    /// and returns `None` if this machine cannot.
    pub fn sharing(mib: u64) -> Option<Self> {
        let image = NamedTempFile::new().unwrap();
        image.as_file().set_len(mib << 20).unwrap();
        let make = |program: &str| {
            Command::new(program).arg("-q").arg(image.path()).output().map(|o| o.status.success())
        };
        if !["mkfs.xfs", "mkfs.btrfs"].iter().any(|program| make(program).unwrap_or(false)) {
            super::skip("no mkfs.xfs or mkfs.btrfs: no filesystem that shares blocks can be made");
            return None;
        }
        let mut filesystem = Self::unmounted()?;
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop"]).arg(image.path()).arg(filesystem.path());
        filesystem.1 = Some(image);
        let mounted = mount.output().expect("mount");
        if !mounted.status.success() {
            super::skip(&format!(
                "no loop device: {}",
                String::from_utf8_lossy(&mounted.stderr).trim()
            ));
            return None;
        }
        Some(filesystem)
    }

    fn unmounted() -> Option<Self> {
        let nothing: Option<&str> = None;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        let alone = unshare(CloneFlags::CLONE_NEWNS)
            .and_then(|()| mount(nothing, "/", nothing, private, nothing));
        if let Err(errno) = alone {
            super::skip(&format!("no mount namespace of its own: {errno}"));
            return None;
        }
        Some(Self(tempfile::Builder::new().prefix("bosh-qemu-cpi-fs-").tempdir().unwrap(), None))
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Mounts an empty tmpfs of `mib` MiB on the mount point.
    pub fn mount(&self, mib: u64) {
        let size = format!("size={mib}m,mode=0755");
        mount(Some("test"), self.path(), Some("tmpfs"), MsFlags::empty(), Some(size.as_str()))
            .expect("mount a tmpfs");
    }

    /// Hides the filesystem below an empty tmpfs, as if it were not mounted.
    pub fn hide(&self) {
        self.mount(1);
    }

    /// Reverts [`Self::hide`].
    pub fn show(&self) {
        umount2(self.path(), MntFlags::MNT_DETACH).expect("unmount");
    }

    /// Names of the entries in its root directory, sorted.
    pub fn names(&self) -> Vec<String> {
        let names = self
            .path()
            .read_dir()
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }
}

impl Drop for Filesystem {
    fn drop(&mut self) {
        // Each `hide` added a mount.
        while umount2(self.path(), MntFlags::MNT_DETACH).is_ok() {}
    }
}
