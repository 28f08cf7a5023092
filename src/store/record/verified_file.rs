//! A file of the operator's whose content was verified.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::units::Bytes;

/// The digest of a file, and the attributes that change with its content. The device is not among
/// them: its number may be another one after a reboot of the host or a mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifiedFile {
    /// Its SHA-256.
    pub sha256: Digest,
    /// Its inode number.
    pub inode: u64,
    /// Its length, bytes.
    pub size: Bytes,
    /// Time of the last change of its content, nanoseconds since 1970.
    pub mtime: i64,
    /// Time of the last change of its content or attributes, nanoseconds since 1970.
    pub ctime: i64,
}

impl VerifiedFile {
    /// A file with these attributes and that digest.
    pub fn new(meta: &Metadata, sha256: Digest) -> Self {
        let nanoseconds =
            |seconds: i64, rest: i64| seconds.saturating_mul(1_000_000_000).saturating_add(rest);
        Self {
            sha256,
            inode: meta.ino(),
            size: Bytes(meta.len()),
            mtime: nanoseconds(meta.mtime(), meta.mtime_nsec()),
            ctime: nanoseconds(meta.ctime(), meta.ctime_nsec()),
        }
    }

    /// Refuses the file at `path` if its content is another one. Reads the content only if an
    /// attribute has changed.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] naming the path, or the error of reading the file.
    pub fn ensure_unchanged(&self, path: &Path) -> Result<()> {
        let now = Self::new(&path.metadata().at("look at", path)?, self.sha256);
        if now == *self {
            return Ok(());
        }
        if now.size == self.size && Digest::of_file(path)? == self.sha256 {
            let path = path.display();
            tracing::info!(%path, "attributes of the image have changed, its SHA-256 has not");
            return Ok(());
        }
        let message = format!("the image '{}' is not the verified one any more", path.display());
        Err(Error::new(ErrorKind::Corrupt, message).hint(
            "put the image with the stemcell's SHA-256 back; a new image needs a path and a \
             stemcell of its own",
        ))
    }
}
