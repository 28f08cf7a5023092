//! Virtual size of an image, and enlarging it while no QEMU has it open.
//!
//! Enlarging does without `qemu-img`, which asks for the key of an encrypted image. A guest's
//! blocks do not move:
//!
//! ```text
//! raw     [ data        ]····      the file gets longer
//! luks    [ header | data ]····    the same; the header does not store the size
//! qcow2   header: size, l1_size    the L1 table gets entries of zero, in the clusters it has
//! ```

use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image::Format;
use crate::image::qcow2::{self, Header};
use crate::store::beneath::{self, Expected, Found};
use crate::units::Bytes;

/// Virtual size of the image at `path`: the bytes the guest sees.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if the header of a qcow2 or LUKS image is not valid.
pub fn virtual_size(path: &Path, format: Format, encrypted: bool) -> Result<Bytes> {
    let image = beneath::file(path, Expected::Own)?;
    match format {
        Format::Qcow2 => Ok(Header::read(&image)?.virtual_size),
        Format::Raw => {
            let header = if encrypted { luks_header(&image)? } else { 0 };
            let length = image.metadata().len();
            length
                .checked_sub(header)
                .map(Bytes)
                .ok_or_else(|| corrupt(path, "it is shorter than its LUKS header"))
        }
    }
}

/// Enlarges the image at `path` to `size`, durably. An image that already has `size` does not
/// change.
///
/// # Errors
/// [`ErrorKind::NotSupported`] for a qcow2 image whose L1 table would have to move: 64 KiB of table
/// map 4 TiB.
pub fn grow(path: &Path, format: Format, encrypted: bool, size: Bytes) -> Result<()> {
    let image = beneath::file(path, Expected::Own)?;
    let file = image.write()?;
    match format {
        Format::Qcow2 => qcow2::grow(&file, path, &Header::read(&image)?, size)?,
        Format::Raw => {
            let header = if encrypted { luks_header(&image)? } else { 0 };
            file.set_len(header + size.get()).at("set the size of", path)?;
        }
    }
    file.sync_all().at("flush", path)
}

/// Length of the LUKS (version 1) header including its key slots, bytes.
fn luks_header(image: &Found) -> Result<u64> {
    let mut head = [0; 108];
    image.read()?.read_exact_at(&mut head, 0).at("read", image.path())?;
    if head[..8] != *b"LUKS\xba\xbe\0\x01" {
        return Err(corrupt(image.path(), "it has no LUKS header"));
    }
    let sectors = u32::from_be_bytes([head[104], head[105], head[106], head[107]]);
    Ok(u64::from(sectors) * 512)
}

fn corrupt(path: &Path, why: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("image '{}': {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{raw, testing};
    use crate::units::MiB;

    fn mib(mib: u64) -> Bytes {
        MiB::new(mib).unwrap().bytes()
    }

    #[test]
    fn a_qcow2_image_grows_over_many_l2_tables_and_stays_sound() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        qcow2::create(&path, mib(100), None).unwrap().sync().unwrap();
        let name = path.to_str().unwrap();
        testing::run("qemu-io", ["-f", "qcow2", "-c", "write -P 7 99M 1M", name].map(Into::into));
        for size in [101, 512, 513, 5000, 4 << 20] {
            grow(&path, Format::Qcow2, false, mib(size)).unwrap();
            assert_eq!(virtual_size(&path, Format::Qcow2, false).unwrap(), mib(size));
            testing::run("qemu-img", ["check", "-q", "-f", "qcow2", name].map(Into::into));
        }
        let last = format!("write -P 9 {}M 1M", (4 << 20) - 1);
        let commands =
            ["-f", "qcow2", "-c", "read -P 7 99M 1M", "-c", "read -P 0 100M 1M", "-c", &last, name];
        testing::run("qemu-io", commands.map(Into::into));
        testing::run("qemu-img", ["check", "-q", "-f", "qcow2", name].map(Into::into));
        let refused = grow(&path, Format::Qcow2, false, mib((4 << 20) + 1)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::NotSupported);
        assert_eq!(virtual_size(&path, Format::Qcow2, false).unwrap(), mib(4 << 20));
    }

    #[test]
    fn raw_image_grows_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        raw::create(&path, mib(1)).unwrap().sync().unwrap();
        grow(&path, Format::Raw, false, mib(3)).unwrap();
        assert_eq!(virtual_size(&path, Format::Raw, false).unwrap(), mib(3));
    }

    #[test]
    fn encrypted_images_grow_without_their_key() {
        let dir = tempfile::tempdir().unwrap();
        for (format, driver, options) in [
            (Format::Raw, "luks", "key-secret=k,iter-time=10"),
            (
                Format::Qcow2,
                "qcow2",
                "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10",
            ),
        ] {
            let path = dir.path().join(driver);
            let name = path.to_str().unwrap();
            let secret = "secret,id=k,data=abcdefgh";
            testing::run(
                "qemu-img",
                ["create", "-q", "--object", secret, "-f", driver, "-o", options, name, "4M"]
                    .map(Into::into),
            );
            assert_eq!(virtual_size(&path, format, true).unwrap(), mib(4));
            grow(&path, format, true, mib(9)).unwrap();
            assert_eq!(virtual_size(&path, format, true).unwrap(), mib(9));
            let prefix = if driver == "luks" { "" } else { "encrypt." };
            let opened = format!("driver={driver},file.filename={name},{prefix}key-secret=k");
            let write = ["--object", secret, "--image-opts", "-c", "write -P 3 8M 1M", &opened];
            testing::run("qemu-io", write.map(Into::into));
        }
        std::fs::write(dir.path().join("plain"), [0; 4096]).unwrap();
        let refused = virtual_size(&dir.path().join("plain"), Format::Raw, true).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Corrupt);
    }
}
