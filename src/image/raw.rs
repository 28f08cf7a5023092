//! Raw images: sparse files.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image::{UnsyncedFile, create_new, keep};
use crate::units::{Bytes, MiB};

/// The unit of zero detection, bytes: the block size of every common filesystem, so a smaller hole
/// would save nothing.
const BLOCK: usize = 4096;

/// Creates an empty raw image of `size` at `path`, mode 0600. It is one hole and allocates no
/// blocks.
///
/// # Errors
/// If `path` exists or cannot be written, or if `size` is not a multiple of 512 from 512 bytes to
/// [`MiB::MAX`].
pub fn create(path: &Path, size: Bytes) -> Result<UnsyncedFile> {
    ensure_valid_size(path, size)?;
    let new = create_new(path)?;
    new.as_file().set_len(size.get()).at("set the size of", path)?;
    Ok(keep(new))
}

/// Fails if the size of a new image is zero, not a multiple of a 512-byte sector, or above
/// [`MiB::MAX`].
pub(super) fn ensure_valid_size(path: &Path, size: Bytes) -> Result<()> {
    if size.get() > 0 && size.get().is_multiple_of(512) && size <= MiB::MAX.bytes() {
        return Ok(());
    }
    let rule = format!("a multiple of 512 up to {}", MiB::MAX.bytes());
    Err(Error::new(
        ErrorKind::BadRequest,
        format!("create '{}': {size} is not {rule}", path.display()),
    ))
}

/// Writes `data` at `offset` of a file that has a hole there, skipping blocks of zeros. Returns how
/// many bytes it wrote.
pub(super) fn write_sparse(file: &File, offset: u64, data: &[u8]) -> io::Result<u64> {
    let (mut start, mut written) = (0, 0);
    while start < data.len() {
        let zeros = count_blocks(&data[start..], true);
        let end = start + zeros + count_blocks(&data[start + zeros..], false);
        file.write_all_at(&data[start + zeros..end], offset + (start + zeros) as u64)?;
        written += end - start - zeros;
        start = end;
    }
    Ok(written as u64)
}

/// Length in bytes of the run of blocks at the start of `data` that are all zero (`zero`) or are
/// not.
fn count_blocks(data: &[u8], zero: bool) -> usize {
    static ZEROS: [u8; BLOCK] = [0; BLOCK];
    let blocks = data.chunks(BLOCK).take_while(|block| (*block == &ZEROS[..block.len()]) == zero);
    blocks.map(<[u8]>::len).sum()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    #[test]
    fn empty_image_allocates_no_blocks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        create(&path, MiB::new(1024 * 1024).unwrap().bytes()).unwrap().sync().unwrap();
        let meta = path.metadata().unwrap();
        assert_eq!(
            (meta.len(), meta.blocks(), meta.permissions().mode() & 0o777),
            (1 << 40, 0, 0o600)
        );
        assert!(
            create(&path, Bytes(512)).unwrap_err().report().contains("exists"),
            "never overwrites"
        );
    }

    #[test]
    fn create_with_an_invalid_size_is_refused_and_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        for size in [0, 513, MiB::MAX.bytes().get() + 512, u64::MAX] {
            assert_eq!(create(&path, Bytes(size)).unwrap_err().kind(), ErrorKind::BadRequest);
        }
        assert!(!path.exists());
    }

    #[test]
    fn sparse_write_leaves_holes_for_zeros() {
        let file = tempfile::tempfile().unwrap();
        let mut data = vec![0u8; 1 << 20];
        data[0] = 1;
        data[300_000..300_010].fill(7);
        *data.last_mut().unwrap() = 9;
        data.extend([0, 0, 3]);
        let written = write_sparse(&file, 8192, &data).unwrap();
        assert_eq!(written, 3 * BLOCK as u64 + 3);
        let mut back = vec![0u8; data.len()];
        file.read_exact_at(&mut back, 8192).unwrap();
        assert_eq!(back, data);
        assert!(file.metadata().unwrap().blocks() * 512 <= 5 * BLOCK as u64);
    }
}
