//! Where a stemcell's image comes from.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::ImportError;
use super::invalid_image::InvalidImage;
use crate::blocking_call::run_with_timeout;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::units::Bytes;

/// An image as BOSH hands it over: a file on this host or on the host of the remote caller.
pub trait ImageSource: Send + Sync {
    /// Its name in messages.
    fn name(&self) -> String;

    /// Its size, if known before reading.
    fn size(&self) -> Option<Bytes>;

    /// Its allocated size: the file's size without its holes.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] if the source does not answer by `deadline`.
    fn allocated_size(&self, deadline: Instant) -> Result<Bytes>;

    /// Its SHA-256, computed without importing it.
    ///
    /// # Errors
    /// Those of [`ImageSource::allocated_size`] and of reading.
    fn digest(&self, deadline: Instant) -> Result<Digest>;

    /// Opens it for reading from the first byte. An image that cannot be decoded as a stream is
    /// opened twice.
    ///
    /// # Errors
    /// [`ImportError::Invalid`] if it is not a file with content; otherwise the error of opening
    /// it.
    fn open(&self) -> Result<Box<dyn Read + Send>, ImportError>;

    /// Compares the digest of all bytes that were read with the source's own, before the import
    /// completes.
    ///
    /// # Errors
    /// If they differ.
    fn verify_digest(&self, _read: &Digest) -> Result<()> {
        Ok(())
    }
}

/// A file on this host.
#[derive(Debug, Clone)]
pub struct ImageFile(PathBuf);

impl ImageFile {
    /// The file at `path`.
    pub fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }
}

impl ImageSource for ImageFile {
    fn name(&self) -> String {
        self.0.display().to_string()
    }

    fn size(&self) -> Option<Bytes> {
        self.0.metadata().ok().filter(std::fs::Metadata::is_file).map(|meta| Bytes(meta.len()))
    }

    fn allocated_size(&self, deadline: Instant) -> Result<Bytes> {
        let path = self.0.clone();
        read_by_deadline(&self.0, deadline, move || {
            // The attributes may be cached; statvfs asks the file server itself.
            let _ = rustix::fs::statvfs(&path);
            Bytes(path.metadata().map_or(0, |meta| meta.len().min(meta.blocks() * 512)))
        })
    }

    fn digest(&self, deadline: Instant) -> Result<Digest> {
        let path = self.0.clone();
        read_by_deadline(&self.0, deadline, move || Digest::of_file(&path))?
    }

    fn open(&self) -> Result<Box<dyn Read + Send>, ImportError> {
        // Checks the file type before opening: opening a pipe waits for its writer.
        let meta = self.0.metadata().at("read", &self.0)?;
        if !meta.is_file() {
            return Err(InvalidImage::NoFile.into());
        }
        if meta.len() == 0 {
            return Err(InvalidImage::Empty.into());
        }
        Ok(Box::new(File::open(&self.0).at("read", &self.0)?))
    }
}

/// Runs `read` on another thread: the file may be large, or its filesystem may not answer.
///
/// # Errors
/// [`ErrorKind::Timeout`] if `read` has not returned by `deadline`.
pub fn read_by_deadline<T: Send + 'static>(
    path: &Path,
    deadline: Instant,
    read: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    run_with_timeout(deadline, read).ok_or_else(|| {
        Error::new(ErrorKind::Timeout, format!("'{}' was not read by the deadline", path.display()))
            .hint(
                "raise the seconds of create_stemcell in 'deadlines', or check whether the file's \
                 filesystem answers",
            )
    })
}
