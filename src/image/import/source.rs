//! Where a stemcell's image comes from.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::Failure;
use super::refusal::Refusal;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::timeout::run_with_timeout;
use crate::units::Bytes;

/// An image as BOSH hands it over: a file of this machine, or of the caller's.
pub trait ImageSource: Send + Sync {
    /// What messages call it.
    fn name(&self) -> String;

    /// Its size, if it is known before it is read.
    fn size(&self) -> Option<Bytes>;

    /// What it takes where it is: its size without its holes.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] when nobody says so by `deadline`.
    fn takes(&self, deadline: Instant) -> Result<Bytes>;

    /// Its SHA-256, without importing it.
    ///
    /// # Errors
    /// As [`ImageSource::takes`], and what reading can bring.
    fn digest(&self, deadline: Instant) -> Result<Digest>;

    /// Its bytes from the first on. An image that can not be decoded as it streams by is read twice.
    ///
    /// # Errors
    /// A refusal of what is no image, and what opening can bring.
    fn open(&self) -> Result<Box<dyn Read + Send>, Failure>;

    /// Hears what was read, all of it, before anything is made of it.
    ///
    /// # Errors
    /// If that is not what the source has.
    fn vouch(&self, _read: &Digest) -> Result<()> {
        Ok(())
    }
}

/// A file of this machine.
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

    fn takes(&self, deadline: Instant) -> Result<Bytes> {
        let path = self.0.clone();
        answered(&self.0, deadline, move || {
            // Attributes may be cached; this asks the server the file is on.
            let _ = rustix::fs::statvfs(&path);
            Bytes(path.metadata().map_or(0, |meta| meta.len().min(meta.blocks() * 512)))
        })
    }

    fn digest(&self, deadline: Instant) -> Result<Digest> {
        let path = self.0.clone();
        answered(&self.0, deadline, move || Digest::of_file(&path))?
    }

    fn open(&self) -> Result<Box<dyn Read + Send>, Failure> {
        // Looked at before it is opened: opening a pipe would wait for its writer.
        let meta = self.0.metadata().at("read", &self.0)?;
        if !meta.is_file() {
            return Err(Refusal::NoFile.into());
        }
        if meta.len() == 0 {
            return Err(Refusal::Empty.into());
        }
        Ok(Box::new(File::open(&self.0).at("read", &self.0)?))
    }
}

/// What `look` finds out about a file, which may be large, or on a filesystem that does not answer.
///
/// # Errors
/// [`ErrorKind::Timeout`] when it has not by `deadline`.
pub fn answered<T: Send + 'static>(
    path: &Path,
    deadline: Instant,
    look: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    run_with_timeout(deadline, look).ok_or_else(|| {
        Error::new(ErrorKind::Timeout, format!("'{}' was not read by the deadline", path.display()))
            .hint("give create_stemcell more seconds in 'deadlines', or see whether the file's filesystem answers")
    })
}
