//! What was installed, on the machine itself.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::authorized_key::AuthorizedKey;
use super::below;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::store::atomic;

/// Where it is written down.
pub const MANIFEST: &str = "/etc/bosh-qemu-cpi/installed.json";

/// Everything that is ours.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Manifest {
    /// Its files, with the digests of what was put there: the last, and before it is there the one before.
    pub files: BTreeMap<PathBuf, BTreeSet<Digest>>,
    /// The keys that may call: one in each file, and before another is there in its place both.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub keys: BTreeSet<AuthorizedKey>,
    /// Whether the group was not there before.
    #[serde(default)]
    pub made_group: bool,
}

impl Manifest {
    /// What is written down; nothing, if there is no such file.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if it can not be understood.
    pub fn read(root: &Path) -> Result<Self> {
        let path = below(root, Path::new(MANIFEST));
        match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            read => serde_json::from_slice(&read.at("read", &path)?).map_err(|error| {
                let message = format!("'{}' can not be used", path.display());
                Error::new(ErrorKind::Corrupt, message)
                    .because(error)
                    .hint("it says what may be replaced and removed")
            }),
        }
    }

    /// The keys that were put where `authorized` goes, but for itself.
    pub fn older(&self, authorized: &AuthorizedKey) -> Vec<AuthorizedKey> {
        self.keys
            .iter()
            .filter(|key| key.file == authorized.file && *key != authorized)
            .cloned()
            .collect()
    }

    /// Writes it down.
    pub fn write(&self, root: &Path) -> Result<()> {
        let path = below(root, Path::new(MANIFEST));
        let dir = path.parent().expect("a file is in a directory");
        std::fs::create_dir_all(dir).at("make directory", dir)?;
        atomic::write_json(&path, self)
    }

    /// Forgets it, with its directory if nothing else is there.
    pub fn remove(root: &Path) -> Result<()> {
        let path = below(root, Path::new(MANIFEST));
        atomic::remove_file(&path)?;
        // An operator's configuration may be beside it.
        let _ = std::fs::remove_dir(path.parent().expect("a file is in a directory"));
        Ok(())
    }

    /// Whether `digest` was put at `path`.
    pub fn has(&self, path: &Path, digest: &Digest) -> bool {
        self.files.get(path).is_some_and(|digests| digests.contains(digest))
    }

    /// Notes that `digest` is about to be put at `path`.
    pub fn add(&mut self, path: &Path, digest: Digest) {
        self.files.entry(path.to_owned()).or_default().insert(digest);
    }

    /// What was there before is not ours any more.
    pub fn set_installed(&mut self, path: &Path, digest: Digest) {
        self.files.insert(path.to_owned(), BTreeSet::from([digest]));
    }

    /// Whether nothing was installed.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty() && self.keys.is_empty()
    }
}
