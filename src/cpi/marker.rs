//! The marker of an object whose cid its caller may not know.
//!
//! The file `untold` in the object's directory exists from before the record says `ready` until the
//! caller has received the cid, or until a call names the object. The process that made it holds a
//! lock on it.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::store::atomic;
use crate::sys::pidlock;

/// A marker that this process made; the lock on it ends with the process.
pub(crate) struct Marker {
    path: PathBuf,
    _lock: File,
}

impl Marker {
    /// The name of the file in the object's directory.
    pub(super) const FILE_NAME: &str = "untold";

    /// Makes the marker `path`.
    pub(super) fn make(path: PathBuf) -> Result<Self> {
        let lock = pidlock::lock_self(&path)?;
        Ok(Self { path, _lock: lock })
    }

    /// Removes the marker: the caller has received the cid.
    pub(super) fn remove(&self) {
        remove(&self.path);
    }
}

/// Removes the marker `path`, if there is one.
pub(super) fn remove(path: &Path) {
    if let Err(error) = atomic::remove_file(path) {
        tracing::warn!(
            path = %path.display(),
            error = error.report(),
            "cannot remove the marker of an unacknowledged create; `audit` will report the object"
        );
    }
}
