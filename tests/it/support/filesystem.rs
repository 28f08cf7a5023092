//! A filesystem of a test's own, mounted where only the test's thread and what it starts can see it.

use std::path::Path;
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use tempfile::{NamedTempFile, TempDir};

/// A mounted tmpfs. Make it before the [`Host`](super::host::Host) that uses it, so that it is there to the end.
pub struct Filesystem(TempDir, Option<NamedTempFile>);

impl Filesystem {
    /// One of `mib` MiB; `None`, with the reason told, where that can not be had.
    pub fn new(mib: u64) -> Option<Self> {
        let filesystem = Self::unmounted()?;
        filesystem.mount(mib);
        Some(filesystem)
    }

    /// One of `mib` MiB in which files can share blocks, at least 300; `None`, with the reason told, where that can not be
    /// had.
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

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Mounts an empty one.
    pub fn mount(&self, mib: u64) {
        let size = format!("size={mib}m,mode=0755");
        mount(Some("test"), self.path(), Some("tmpfs"), MsFlags::empty(), Some(size.as_str()))
            .expect("mount a tmpfs");
    }

    /// Hides it below an empty directory, as when it is not mounted.
    pub fn hide(&self) {
        self.mount(1);
    }

    /// The end of [`Self::hide`].
    pub fn show(&self) {
        umount2(self.path(), MntFlags::MNT_DETACH).expect("unmount");
    }

    /// What is in it.
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
        // As often as something is mounted there.
        while umount2(self.path(), MntFlags::MNT_DETACH).is_ok() {}
    }
}
