//! New images of every kind. Thin plain ones, nearly all there are, are written here; `qemu-img` makes the others.

use std::path::Path;
use std::time::Instant;

use super::qemu_img::QemuImg;
use super::{Format, UnsyncedFile, create_new, keep, qcow2, raw};
use crate::error::Result;
use crate::store::record::Preallocation;
use crate::units::Bytes;

/// An image to be made.
#[derive(Debug, Clone, Copy)]
pub struct NewImage<'a> {
    /// Where. Must not exist; its directory must.
    pub path: &'a Path,
    /// Its format.
    pub format: Format,
    /// What a guest sees as its size. An encrypted one has a header of 2 MiB more.
    pub size: Bytes,
    /// How much of it is there from the beginning.
    pub preallocation: Preallocation,
    /// The file with the key that encrypts it.
    pub key: Option<&'a Path>,
}

impl NewImage<'_> {
    /// Makes it, mode 0600: complete, or not there.
    ///
    /// # Errors
    /// As [`qcow2::create`] and [`QemuImg::create`].
    pub fn create(&self, qemu_img: &QemuImg, deadline: Instant) -> Result<UnsyncedFile> {
        if self.preallocation == Preallocation::Off && self.key.is_none() {
            return match self.format {
                Format::Qcow2 => qcow2::create(self.path, self.size, None),
                Format::Raw => raw::create(self.path, self.size),
            };
        }
        raw::check_size(self.path, self.size)?;
        // There before `qemu-img` comes, so that the mode is ours and what is refused is removed.
        let new = create_new(self.path)?;
        qemu_img.create(self, deadline)?;
        keep(new)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::time::Duration;

    use super::*;
    use crate::image::qcow2::{Encryption, Header};

    fn test_deadline() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn preallocated_space_is_there() {
        let dir = tempfile::tempdir().unwrap();
        for (format, preallocation, blocks) in [
            (Format::Raw, Preallocation::Falloc, 8 << 11),
            (Format::Raw, Preallocation::Full, 8 << 11),
            (Format::Qcow2, Preallocation::Falloc, 8 << 11),
            (Format::Qcow2, Preallocation::Metadata, 1),
        ] {
            let path = dir.path().join(format!("{preallocation}.{format}"));
            let new =
                NewImage { path: &path, format, size: Bytes(8 << 20), preallocation, key: None };
            new.create(&QemuImg::new("qemu-img"), test_deadline()).unwrap().sync().unwrap();
            let meta = path.metadata().unwrap();
            assert!(meta.blocks() >= blocks, "{path:?}: {} blocks", meta.blocks());
            assert_eq!(meta.permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn an_encrypted_image_is_luks_and_a_failure_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (key, path) = (dir.path().join("k,ey"), dir.path().join("disk.qcow2"));
        let preallocation = Preallocation::Off;
        let new = NewImage {
            path: &path,
            format: Format::Qcow2,
            size: Bytes(1 << 20),
            preallocation,
            key: Some(&key),
        };
        let failed = new.create(&QemuImg::new("qemu-img"), test_deadline()).unwrap_err();
        assert!(failed.report().contains("qemu-img create"), "{}", failed.report());
        assert!(!path.exists());
        std::fs::write(&key, "0123456789".repeat(4)).unwrap();
        new.create(&QemuImg::new("qemu-img"), test_deadline()).unwrap().sync().unwrap();
        assert_eq!(Header::read(&path).unwrap().encryption, Some(Encryption::Luks));
    }
}
