//! Pools: directories for images that the operator configures, on any filesystem. Records and locks
//! are in the state directory.
//!
//! ```text
//! <pool>/                     not made by the CPI: images must not fill the filesystem below
//!   .bosh-qemu-cpi            marker, made at the first use: identifies the directory
//!   <cid>/                    made after the record that names the pool, removed before it
//!     disk.qcow2 | root.qcow2  ephemeral.qcow2 | image.raw | base.raw
//!     host-<id>               owner file of a disk in a shared pool, see `ownership`
//! <state_dir>/pools/<name>    marker that the pool was used
//! ```
//!
//! `base.raw` is in the stemcell's pool, under the VM's cid: it is a hard link, which cannot leave
//! its filesystem.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{atomic, beneath};
use crate::blocking_call::run_with_timeout;
use crate::config::Pool;
use crate::crash;
use crate::error::{Error, ErrorKind, IoContext, Result};

/// Marker file of a pool that was used.
const MARKER: &str = ".bosh-qemu-cpi";
/// How long a pool's filesystem may take to answer. A busy NFS server is slower than a disk.
const POOL_ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The pools of this host.
#[derive(Debug, Clone, Default)]
pub struct Pools {
    state_dir: PathBuf,
    pools: BTreeMap<String, Pool>,
    /// Directories that did not answer. This call does not access them again: it would wait for
    /// each image there.
    unresponsive: Arc<Mutex<BTreeSet<PathBuf>>>,
}

impl Pools {
    /// The `pools` of the configuration, for the store in `state_dir`.
    pub fn new(state_dir: &Path, pools: BTreeMap<String, Pool>) -> Self {
        Self { state_dir: state_dir.to_owned(), pools, unresponsive: Arc::default() }
    }

    /// The names of all pools.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.pools.keys().map(String::as_str)
    }

    /// The names of the pools that other hosts use, too.
    pub fn shared(&self) -> impl Iterator<Item = &str> {
        self.pools.iter().filter(|(_, pool)| pool.shared).map(|(name, _)| name.as_str())
    }

    /// Whether other hosts use the pool `name`, too.
    pub fn is_shared(&self, name: &str) -> bool {
        self.pools.get(name).is_some_and(|pool| pool.shared)
    }

    /// The directory of the pool `name`, after a check that it is the directory used before.
    ///
    /// # Errors
    /// [`ErrorKind::BadConfig`] for an unknown pool, [`ErrorKind::Host`] for one that is not
    /// mounted, [`ErrorKind::Timeout`] if its filesystem does not answer within 10 s.
    pub fn dir(&self, name: &str) -> Result<&Path> {
        let pool = self.pools.get(name).ok_or_else(|| {
            Error::new(
                ErrorKind::BadConfig,
                format!("there is no pool '{name}' in the configuration"),
            )
            .hint("the pool has images: add its directory to 'pools' again")
        })?;
        let (meta, is_marked) = self.stat(name, &pool.path)?;
        if !meta.is_dir() {
            return Err(absent(name, &pool.path, "is not a directory"));
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
        if self.used_marker(name).exists() && !is_marked {
            return Err(absent(name, &pool.path, "is not the directory that was used before")
                .hint(format!(
                    "mount it; if the pool has a new directory on purpose, remove '{}' first",
                    self.used_marker(name).display()
                )));
        }
        Ok(&pool.path)
    }

    /// A call's first access to a pool: the directory's metadata, and whether it has the marker
    /// file.
    fn stat(&self, name: &str, path: &Path) -> Result<(Metadata, bool)> {
        let unresponsive = || self.unresponsive.lock().unwrap_or_else(PoisonError::into_inner);
        let directory = path.to_owned();
        let stat = move || {
            // An NFS client may cache attributes; statvfs asks the server.
            rustix::fs::statvfs(&directory)?;
            let marker = directory.join(MARKER).symlink_metadata();
            directory.metadata().map(|meta| (meta, marker.is_ok_and(|marker| marker.is_file())))
        };
        let known = unresponsive().contains(path);
        match if known {
            None
        } else {
            run_with_timeout(Instant::now() + POOL_ANSWER_TIMEOUT, stat)
        } {
            Some(seen) => seen.map_err(|e| absent(name, path, "cannot be used").because(e)),
            None => {
                unresponsive().insert(path.to_owned());
                let message = format!(
                    "pool '{name}': '{}' did not answer within {POOL_ANSWER_TIMEOUT:?}",
                    path.display()
                );
                Err(Error::new(ErrorKind::Timeout, message).hint(format!(
                    "its server or disk may be down: check with `stat {}`, then repeat the call",
                    path.display()
                )))
            }
        }
    }

    /// As [`Self::dir`], and makes both markers at the pool's first use.
    pub(super) fn mark_used(&self, name: &str) -> Result<&Path> {
        let dir = self.dir(name)?;
        let (marker, used) = (dir.join(MARKER), self.used_marker(name));
        if !used.exists() {
            beneath::make_marker(&marker)
                .map_err(|e| absent(name, dir, "cannot be written").because(e))?;
            atomic::sync_dir(dir)?;
            crash::point!("pool marked");
            let dir_of_used = self.state_dir.join("pools");
            atomic::make_dir(&dir_of_used)?;
            std::fs::write(&used, "").at("make", &used)?;
            crash::point!("use of pool recorded");
            atomic::sync_dir(&dir_of_used)?;
        }
        Ok(dir)
    }

    fn used_marker(&self, name: &str) -> PathBuf {
        self.state_dir.join("pools").join(name)
    }

    fn is_on(&self, pool: &std::fs::Metadata, other: &Path) -> Result<bool> {
        // Before the first call, the state directory does not exist.
        let existing = other.ancestors().find(|path| path.exists()).unwrap_or(other);
        existing.metadata().map(|other| other.dev() == pool.dev()).at("stat", other)
    }
}

pub(super) fn absent(name: &str, path: &Path, why: &str) -> Error {
    Error::new(ErrorKind::Host, format!("pool '{name}': '{}' {why}", path.display())).hint(
        "mount its filesystem, or correct 'pools' in the configuration; the CPI never makes \
               a pool's directory",
    )
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
    fn a_used_pool_without_its_marker_is_refused() {
        let state = tempfile::tempdir().unwrap();
        let pool = tempfile::tempdir().unwrap();
        let pools = pools(state.path(), pool.path(), false);
        pools.mark_used("fast").unwrap();
        assert_eq!(pools.mark_used("fast").unwrap(), pool.path(), "the second use changes nothing");
        std::fs::remove_file(pool.path().join(MARKER)).unwrap();
        let refused = pools.dir("fast").unwrap_err().report();
        assert!(refused.starts_with(&format!(
            "pool 'fast': '{}' is not the directory",
            pool.path().display()
        )));
        assert!(refused.contains("pools/fast' first"), "{refused}");
    }

    #[test]
    fn a_missing_pool_directory_is_never_made() {
        let state = tempfile::tempdir().unwrap();
        let path = state.path().join("nothing");
        let refused = pools(state.path(), &path, false).mark_used("fast").unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Host);
        assert!(refused.report().contains("pool 'fast'"), "{}", refused.report());
        assert!(!path.exists());
        assert_eq!(
            pools(state.path(), &path, false).dir("slow").unwrap_err().kind(),
            ErrorKind::BadConfig
        );
    }

    #[test]
    fn a_shared_pool_on_the_state_directorys_filesystem_is_refused() {
        let state = tempfile::tempdir().unwrap();
        let refused = pools(state.path(), state.path(), true).dir("fast").unwrap_err().report();
        assert!(refused.contains("is shared, but on the filesystem of"), "{refused}");
    }
}
