//! Creates images of every format. Sparse, unencrypted images, nearly all there are, are written
//! here; `qemu-img` creates the others.

use std::time::Instant;

use super::qemu_img::{NewImage, QemuImg};
use super::{Format, UnsyncedFile, create_new, keep, qcow2, raw};
use crate::error::Result;
use crate::store::record::Preallocation;

impl NewImage<'_> {
    /// Creates the image with mode 0600. After an error the file does not exist.
    ///
    /// # Errors
    /// Those of [`qcow2::create`]; `Timeout` if `qemu-img` is not done by `deadline`,
    /// and `Host` with its last line if it fails.
    pub fn create(&self, qemu_img: &QemuImg, deadline: Instant) -> Result<UnsyncedFile> {
        if self.preallocation == Preallocation::Off && self.key.is_none() {
            return match self.format {
                Format::Qcow2 => qcow2::create(self.path, self.size, None),
                Format::Raw => raw::create(self.path, self.size),
            };
        }
        raw::ensure_valid_size(self.path, self.size)?;
        // The file is created before `qemu-img` runs: it gets mode 0600, and a failure removes it.
        let new = create_new(self.path)?;
        qemu_img.create(self, &new, deadline)?;
        Ok(keep(new))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::time::Duration;

    use super::*;
    use crate::image::qcow2::Encryption;
    use crate::image::testing::header;
    use crate::units::Bytes;

    fn test_deadline() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn preallocation_allocates_blocks() {
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
    fn encrypted_image_is_luks_and_a_failure_leaves_no_file() {
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
        assert_eq!(header(&path).encryption, Some(Encryption::Luks));
    }
}
