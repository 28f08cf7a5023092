//! Copies image files: shares blocks where the filesystem supports it, else copies data and skips
//! holes.
//!
//! A copy may take hours, so it does not lock writers out. Instead it detects writes by the
//! source's ctime: every write updates ctime before the data, and no system call sets it back.
//! Reading a file, or cloning its blocks, does not change ctime (ext4, XFS and Btrfs in Linux 6.18,
//! writing past the page cache).

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{SeekFrom, ioctl_ficlone, seek};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image::{UnsyncedFile, create_new, keep};
use crate::store::beneath::{self, Expected};

/// Bytes copied between two checks of the deadline and of the source's ctime.
const CHUNK: u64 = 64 << 20;

/// An image file to copy, with the ctime it had when it was opened.
#[derive(Debug)]
pub struct CopySource {
    file: File,
    path: PathBuf,
    length: u64,
    ctime: (i64, i64),
}

impl CopySource {
    /// Opens the file at `path`. No process may be writing it at this moment.
    pub fn open(path: &Path) -> Result<Self> {
        let file = beneath::file(path, Expected::Own)?.read()?;
        let meta = file.metadata().at("stat", path)?;
        Ok(Self {
            file,
            path: path.to_owned(),
            length: meta.len(),
            ctime: (meta.ctime(), meta.ctime_nsec()),
        })
    }

    /// Fails if the file was written since it was opened.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if it was.
    pub fn ensure_unchanged(&self) -> Result<()> {
        let meta = self.file.metadata().at("stat", &self.path)?;
        if (meta.ctime(), meta.ctime_nsec()) == self.ctime {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Conflict,
            format!("'{}' was written to while it was copied", self.path.display()),
        ))
    }
}

/// Copies the file `source` to `target`, which must not exist, with mode 0600. Holes stay holes.
/// Where the filesystem can share blocks (XFS, Btrfs), no data is copied.
///
/// `progress` receives the bytes done and the bytes in total.
///
/// # Errors
/// [`ErrorKind::Timeout`] at the deadline, [`ErrorKind::NoDiskSpace`], [`ErrorKind::Conflict`] if
/// the source was written since it was opened. `target` does not exist after an error.
pub fn copy(
    source: &CopySource,
    target: &Path,
    deadline: Instant,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<UnsyncedFile> {
    let new = create_new(target)?;
    // The error differs by filesystem: no support at all, or no support between these two files.
    // Any error falls back to copying.
    if ioctl_ficlone(new.as_file(), &source.file).is_err() {
        new.as_file().set_len(source.length).at("set the size of", target)?;
        copy_data(source, new.as_file(), target, deadline, progress)?;
    }
    source.ensure_unchanged()?;
    Ok(keep(new))
}

fn copy_data(
    source: &CopySource,
    to: &File,
    target: &Path,
    deadline: Instant,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let (from, length) = (&source.file, source.length);
    let failed = |error| Error::io(format!("copy '{}' to", source.path.display()), target, error);
    let mut at = 0;
    while at < length {
        let start = match seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            // A hole reaches to the end of the file.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(failed(error.into())),
        };
        let end = seek(from, SeekFrom::Hole(start)).map_err(|e| failed(e.into()))?;
        at = start;
        while at < end {
            source.ensure_unchanged()?;
            if Instant::now() >= deadline {
                let message = format!("copying '{}' took too long", source.path.display());
                return Err(Error::new(ErrorKind::Timeout, message));
            }
            at += copy_range(from, to, at, CHUNK.min(end - at)).map_err(failed)?;
            progress(at, length);
        }
    }
    Ok(())
}

/// Copies up to `length` bytes from offset `at` and returns the number copied.
fn copy_range(from: &File, mut to: &File, at: u64, length: u64) -> io::Result<u64> {
    seek(from, SeekFrom::Start(at))?;
    seek(to, SeekFrom::Start(at))?;
    // io::copy uses copy_file_range(2) where the kernel supports it.
    match io::copy(&mut from.take(length), &mut to)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        copied => Ok(copied),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::time::Duration;

    use super::*;

    fn test_deadline() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn copy_keeps_data_and_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("a"), dir.path().join("b"));
        let file = File::create(&source).unwrap();
        file.set_len(300 << 20).unwrap();
        for at in [0, 10 << 20, (200 << 20) + 5] {
            file.write_all_at(b"here", at).unwrap();
        }
        let mut seen = Vec::new();
        let source = CopySource::open(&source).unwrap();
        copy(&source, &target, test_deadline(), &mut |done, of| seen.push((done, of)))
            .unwrap()
            .sync()
            .unwrap();
        let meta = target.metadata().unwrap();
        assert_eq!(meta.len(), 300 << 20);
        assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
        let copied = File::open(&target).unwrap();
        for at in [0, 10 << 20, (200 << 20) + 5] {
            let mut word = [0; 4];
            copied.read_exact_at(&mut word, at).unwrap();
            assert_eq!(&word, b"here");
        }
        assert!(seen.iter().all(|(done, of)| done <= of && *of == 300 << 20), "{seen:?}");
        assert!(
            copy(&source, &target, test_deadline(), &mut |_, _| ()).is_err(),
            "never overwrites"
        );
    }

    #[test]
    fn copy_past_its_deadline_leaves_no_target() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&source, vec![1; 1 << 20]).unwrap();
        let source = CopySource::open(&source).unwrap();
        let shares_blocks =
            copy(&source, &dir.path().join("c"), Instant::now(), &mut |_, _| ()).is_ok();
        let late = copy(&source, &target, Instant::now(), &mut |_, _| ());
        if !shares_blocks {
            assert_eq!(late.unwrap_err().kind(), ErrorKind::Timeout);
            assert!(!target.exists());
        }
    }

    #[test]
    fn copy_of_a_source_written_meanwhile_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (path, target) = (dir.path().join("a"), dir.path().join("b"));
        let file = File::create(&path).unwrap();
        file.set_len(4 * CHUNK).unwrap();
        file.write_all_at(b"here", 0).unwrap();
        file.write_all_at(b"there", 3 * CHUNK).unwrap();
        let source = CopySource::open(&path).unwrap();
        // The filesystem's clock has a granularity of some milliseconds, so one write may keep the
        // ctime. A QEMU takes longer than that to start.
        while source.ensure_unchanged().is_ok() {
            file.write_all_at(b"new", 2 * CHUNK).unwrap();
        }
        let changed = copy(&source, &target, test_deadline(), &mut |_, _| ()).unwrap_err();
        assert_eq!(changed.kind(), ErrorKind::Conflict, "{}", changed.report());
        assert!(!target.exists());
        let source = CopySource::open(&path).unwrap();
        copy(&source, &target, test_deadline(), &mut |_, _| ()).unwrap().sync().unwrap();
        assert_eq!(std::fs::read(&target).unwrap()[..4], *b"here");
    }
}
