//! Pools: the operator's directories for images, on whatever filesystem. Records and locks stay in the state directory.
//!
//! ```text
//! <pool>/                     never made by us: what is not mounted must not fill the filesystem below
//!   .bosh-qemu-cpi            left at the first use; a directory without it is not the one that was used before
//!   <cid>/                    made after the record that names the pool, removed before it
//!     disk.qcow2 | root.qcow2  ephemeral.qcow2 | image.raw | base.raw
//!     host-<id>               beside a disk's images in a shared pool: whose it is, see `ownership`
//! <state_dir>/pools/<name>    there once the pool was used
//! ```
//!
//! `base.raw` is in the stemcell's pool, under the VM's cid: a hard link, which can not leave its filesystem.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{Metadata, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::atomic;
use crate::config::Pool;
use crate::crash;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::patience::within;

/// What a used pool is known by.
const MARK: &str = ".bosh-qemu-cpi";
/// A server that is busy answers later than a disk; one that has not answered by now is taken for gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// The pools of this host.
#[derive(Debug, Clone, Default)]
pub struct Pools {
    state_dir: PathBuf,
    pools: BTreeMap<String, Pool>,
    /// Directories that did not answer. They are not asked again: a call that looks at the space of all would wait for each
    /// image in them.
    silent: Arc<Mutex<BTreeSet<PathBuf>>>,
}

impl Pools {
    /// The `pools` of the configuration, used by the store in `state_dir`.
    pub fn new(state_dir: &Path, pools: BTreeMap<String, Pool>) -> Self {
        Self { state_dir: state_dir.to_owned(), pools, silent: Arc::default() }
    }

    /// Their names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.pools.keys().map(String::as_str)
    }

    /// The names of those that other hosts use, too.
    pub fn shared(&self) -> impl Iterator<Item = &str> {
        self.pools.iter().filter(|(_, pool)| pool.shared).map(|(name, _)| name.as_str())
    }

    /// Whether other hosts use the pool `name`, too.
    pub fn is_shared(&self, name: &str) -> bool {
        self.pools.get(name).is_some_and(|pool| pool.shared)
    }

    /// The directory of the pool `name`, which is there and is the one that was used before.
    ///
    /// # Errors
    /// [`ErrorKind::BadConfig`] for an unknown pool, [`ErrorKind::Host`] for one that is not mounted,
    /// [`ErrorKind::Timeout`] for one whose filesystem does not answer.
    pub fn dir(&self, name: &str) -> Result<&Path> {
        let pool = self.pools.get(name).ok_or_else(|| {
            Error::new(
                ErrorKind::BadConfig,
                format!("there is no pool '{name}' in the configuration"),
            )
            .hint("images are in it: name its directory in 'pools' again")
        })?;
        let (meta, is_marked) = self.look(name, &pool.path)?;
        if !meta.is_dir() {
            return Err(absent(name, &pool.path, "is no directory"));
        }
        if pool.shared
            && (self.is_on(&meta, Path::new("/"))? || self.is_on(&meta, &self.state_dir)?)
        {
            return Err(absent(
                name,
                &pool.path,
                "is shared, but on the filesystem of '/' or of the state directory",
            ));
        }
        if self.note(name).exists() && !is_marked {
            return Err(absent(name, &pool.path, "is not the directory that was used before")
                .hint(format!(
                    "mount it; if it is really a new one, remove '{}' first",
                    self.note(name).display()
                )));
        }
        Ok(&pool.path)
    }

    /// The first touch of a pool in a call: the directory and whether it has our mark.
    fn look(&self, name: &str, path: &Path) -> Result<(Metadata, bool)> {
        let silent = || self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        let looked = path.to_owned();
        let look = move || {
            // Attributes may be cached; this asks the server.
            rustix::fs::statvfs(&looked)?;
            looked.metadata().map(|meta| (meta, looked.join(MARK).exists()))
        };
        let known = silent().contains(path);
        match if known { None } else { within(Instant::now() + PATIENCE, look) } {
            Some(seen) => seen.map_err(|e| absent(name, path, "can not be used").because(e)),
            None => {
                silent().insert(path.to_owned());
                let message = format!(
                    "pool '{name}': '{}' did not answer within {PATIENCE:?}",
                    path.display()
                );
                Err(Error::new(ErrorKind::Timeout, message).hint(format!(
                    "its server or disk may be gone: try `stat {}`, then repeat the call",
                    path.display()
                )))
            }
        }
    }

    /// As [`Self::dir`], marking the pool if this is its first use.
    pub(super) fn claim(&self, name: &str) -> Result<&Path> {
        let dir = self.dir(name)?;
        let (mark, note) = (dir.join(MARK), self.note(name));
        if !note.exists() {
            let open =
                OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&mark);
            open.map_err(|e| absent(name, dir, "can not be written").because(e))?;
            atomic::sync_dir(dir)?;
            crash::point!("pool marked");
            let notes = self.state_dir.join("pools");
            atomic::make_dir(&notes)?;
            std::fs::write(&note, "").at("make", &note)?;
            crash::point!("use of pool noted");
            atomic::sync_dir(&notes)?;
        }
        Ok(dir)
    }

    fn note(&self, name: &str) -> PathBuf {
        self.state_dir.join("pools").join(name)
    }

    fn is_on(&self, pool: &std::fs::Metadata, other: &Path) -> Result<bool> {
        // A host that was asked for nothing yet has no state directory.
        let there = other.ancestors().find(|path| path.exists()).unwrap_or(other);
        there.metadata().map(|other| other.dev() == pool.dev()).at("look at", other)
    }
}

pub(super) fn absent(name: &str, path: &Path, why: &str) -> Error {
    Error::new(ErrorKind::Host, format!("pool '{name}': '{}' {why}", path.display()))
        .hint("mount its filesystem, or correct 'pools' in the configuration; a pool's directory is never made")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pools(state: &Path, path: &Path, shared: bool) -> Pools {
        Pools::new(
            state,
            BTreeMap::from([("fast".to_owned(), Pool { path: path.to_owned(), shared })]),
        )
    }

    #[test]
    fn a_directory_that_lost_its_mark_is_not_mounted() {
        let state = tempfile::tempdir().unwrap();
        let pool = tempfile::tempdir().unwrap();
        let pools = pools(state.path(), pool.path(), false);
        pools.claim("fast").unwrap();
        assert_eq!(pools.claim("fast").unwrap(), pool.path(), "twice is once");
        std::fs::remove_file(pool.path().join(MARK)).unwrap();
        let refused = pools.dir("fast").unwrap_err().report();
        assert!(refused.starts_with(&format!(
            "pool 'fast': '{}' is not the directory",
            pool.path().display()
        )));
        assert!(refused.contains("pools/fast' first"), "{refused}");
    }

    #[test]
    fn what_is_not_there_is_never_made() {
        let state = tempfile::tempdir().unwrap();
        let path = state.path().join("nothing");
        let refused = pools(state.path(), &path, false).claim("fast").unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Host);
        assert!(refused.report().contains("pool 'fast'"), "{}", refused.report());
        assert!(!path.exists());
        assert_eq!(
            pools(state.path(), &path, false).dir("slow").unwrap_err().kind(),
            ErrorKind::BadConfig
        );
    }

    #[test]
    fn a_shared_pool_is_a_filesystem_of_its_own() {
        let state = tempfile::tempdir().unwrap();
        let refused = pools(state.path(), state.path(), true).dir("fast").unwrap_err().report();
        assert!(refused.contains("is shared, but on the filesystem of"), "{refused}");
    }
}
