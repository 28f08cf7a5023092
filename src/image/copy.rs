//! Copies of image files that nobody writes: shared blocks where the filesystem can, else data without its holes.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::Instant;

use rustix::fs::{SeekFrom, ioctl_ficlone, seek};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image::{Fresh, create_new, keep};

/// Copied between two looks at the clock, bytes.
const CHUNK: u64 = 64 << 20;

/// Copies the file `source` to `target`, which must not exist, with mode 0600; `progress` is told how many of how many
/// bytes are done. Holes stay holes. Where the filesystem can share blocks (XFS, Btrfs), nothing is copied at all.
///
/// # Errors
/// [`ErrorKind::Timeout`] at the deadline, [`ErrorKind::NoDiskSpace`]; nothing is left then.
pub fn copy(source: &Path, target: &Path, deadline: Instant, progress: &mut dyn FnMut(u64, u64)) -> Result<Fresh> {
    let from = File::open(source).at("open", source)?;
    let new = create_new(target)?;
    // A filesystem that can not, and one that could but not between these two, say so in their own ways.
    if ioctl_ficlone(new.as_file(), &from).is_err() {
        let length = from.metadata().at("look at", source)?.len();
        new.as_file().set_len(length).at("set the size of", target)?;
        copy_data(&from, new.as_file(), length, deadline, progress).map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => {
                Error::new(ErrorKind::Timeout, format!("copying '{}' took too long", source.display()))
            }
            _ => Error::io(format!("copy '{}' to", source.display()), target, error),
        })?;
    }
    keep(new)
}

fn copy_data(
    from: &File,
    mut to: &File,
    length: u64,
    deadline: Instant,
    progress: &mut dyn FnMut(u64, u64),
) -> io::Result<()> {
    let mut at = 0;
    while at < length {
        let start = match seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(from, SeekFrom::Hole(start))?;
        at = start;
        while at < end {
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            seek(from, SeekFrom::Start(at))?;
            seek(to, SeekFrom::Start(at))?;
            // In the kernel: copy_file_range(2) where it works.
            match io::copy(&mut from.take(CHUNK.min(end - at)), &mut to)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                copied => at += copied,
            }
            progress(at, length);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};
    use std::time::Duration;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn data_and_holes_arrive() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("a"), dir.path().join("b"));
        let file = File::create(&source).unwrap();
        file.set_len(300 << 20).unwrap();
        for at in [0, 10 << 20, (200 << 20) + 5] {
            file.write_all_at(b"here", at).unwrap();
        }
        let mut seen = Vec::new();
        copy(&source, &target, soon(), &mut |done, of| seen.push((done, of))).unwrap().sync().unwrap();
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
        assert!(copy(&source, &target, soon(), &mut |_, _| ()).is_err(), "never overwrites");
    }

    #[test]
    fn what_took_too_long_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&source, vec![1; 1 << 20]).unwrap();
        let shares_blocks = copy(&source, &dir.path().join("c"), Instant::now(), &mut |_, _| ()).is_ok();
        let late = copy(&source, &target, Instant::now(), &mut |_, _| ());
        if !shares_blocks {
            assert_eq!(late.unwrap_err().kind(), ErrorKind::Timeout);
            assert!(!target.exists());
        }
    }
}
