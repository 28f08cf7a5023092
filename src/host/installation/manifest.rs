//! The manifest: which files and keys were installed on this machine.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::authorized_key::AuthorizedKey;
use super::below;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::store::atomic;

/// Path of the manifest.
pub const MANIFEST: &str = "/etc/bosh-qemu-cpi/installed.json";

/// Everything that was installed.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Manifest {
    /// The files with the digests of their installed contents. While a file is being replaced, both
    /// its old and its new digest.
    pub files: BTreeMap<PathBuf, BTreeSet<Digest>>,
    /// The keys that may call the CPI: one for each file. While a key is being replaced, both.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub keys: BTreeSet<AuthorizedKey>,
    /// Whether the installation made the group.
    #[serde(default)]
    pub made_group: bool,
}

impl Manifest {
    /// Reads the manifest; an empty one if the file does not exist.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if it cannot be parsed.
    pub fn read(root: &Path) -> Result<Self> {
        let path = below(root, Path::new(MANIFEST));
        match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            read => serde_json::from_slice(&read.at("read", &path)?).map_err(|error| {
                let message = format!("'{}' cannot be used", path.display());
                Error::new(ErrorKind::Corrupt, message).because(error).hint(
                    "it lists the files that may be replaced and removed: \
                         restore it from a backup, or remove it and the files it names",
                )
            }),
        }
    }

    /// Returns the installed keys in the file of `authorized`, without `authorized` itself.
    pub fn older(&self, authorized: &AuthorizedKey) -> Vec<AuthorizedKey> {
        self.keys
            .iter()
            .filter(|key| key.file == authorized.file && *key != authorized)
            .cloned()
            .collect()
    }

    /// Writes the manifest, and makes its directory if needed.
    pub fn write(&self, root: &Path) -> Result<()> {
        let path = below(root, Path::new(MANIFEST));
        let dir = path.parent().expect("a file is in a directory");
        std::fs::create_dir_all(dir).at("make directory", dir)?;
        atomic::write_json(&path, self)
    }

    /// Removes the manifest, and its directory if that is empty.
    pub fn remove(root: &Path) -> Result<()> {
        let path = below(root, Path::new(MANIFEST));
        atomic::remove_file(&path)?;
        // Fails if the directory contains other files, such as the operator's configuration.
        let _ = std::fs::remove_dir(path.parent().expect("a file is in a directory"));
        Ok(())
    }

    /// Returns whether the file `path` was installed with `digest`.
    pub fn has(&self, path: &Path, digest: &Digest) -> bool {
        self.files.get(path).is_some_and(|digests| digests.contains(digest))
    }

    /// Adds `digest` for `path`, before the file is written.
    pub fn add(&mut self, path: &Path, digest: Digest) {
        self.files.entry(path.to_owned()).or_default().insert(digest);
    }

    /// Sets `digest` as the only one of `path`, after the file was written.
    pub fn set_installed(&mut self, path: &Path, digest: Digest) {
        self.files.insert(path.to_owned(), BTreeSet::from([digest]));
    }

    /// Returns whether nothing was installed.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty() && self.keys.is_empty()
    }
}
