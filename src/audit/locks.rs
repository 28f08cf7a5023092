//! Locks of objects, so that no call works on an object while it is inspected.

use std::fmt::Display;
use std::time::Instant;

use super::Audit;
use crate::error::{ErrorKind, Result};
use crate::store::{Guard, Rank, TryLock};

/// A lock on an object, held while the object is inspected.
pub(super) enum ObjectLock {
    /// For `gc`: the lock that every call takes.
    Exclusive(Guard),
    /// For `audit`: needs no write, so it works on a read-only filesystem.
    Shared(TryLock),
}

impl Audit<'_> {
    /// Locks an object; `None` as for [`Self::lock`], and if the object was deleted since it was
    /// listed.
    pub(super) fn lock_object(&mut self, rank: Rank, name: impl Display) -> Option<ObjectLock> {
        let name = name.to_string();
        let lock = self.lock(rank, &name)?;
        if self.cx.store.lock_has_object(rank, &name) {
            return Some(lock);
        }
        // A lock file that existed before may be what is left of the object.
        if let Err(error) = lock.release() {
            tracing::warn!(error = error.report(), "cannot remove a lock file of nothing");
        }
        None
    }

    /// Locks what may exist; `None` if a call works on it, or if the lock cannot be used, which is
    /// a finding.
    pub(super) fn lock(&mut self, rank: Rank, name: impl Display) -> Option<ObjectLock> {
        let store = &self.cx.store;
        let locked = if self.repair {
            store.lock(rank, &name, Instant::now()).map(|lock| Some(ObjectLock::Exclusive(lock)))
        } else {
            store.try_lock(rank, &name).map(|lock| lock.map(ObjectLock::Shared))
        };
        match locked {
            Err(error) if error.kind() == ErrorKind::Timeout => None,
            Err(error) => {
                let what = format!("lock {}.{name}", rank.as_str());
                // The same lock is taken more than once.
                if !self.findings.iter().any(|finding| finding.what == what) {
                    self.unusable(&what, &error);
                }
                None
            }
            Ok(lock) => lock,
        }
    }
}

impl ObjectLock {
    /// The lock for a repair.
    pub(super) fn exclusive(&self) -> &Guard {
        match self {
            Self::Exclusive(lock) => lock,
            Self::Shared(_) => unreachable!("`audit` repairs nothing"),
        }
    }

    /// Whether the lock file existed before.
    pub(super) fn had_file(&self) -> bool {
        match self {
            Self::Exclusive(lock) => !lock.is_new(),
            Self::Shared(lock) => lock.has_file(),
        }
    }

    /// Releases the lock. A lock file that this audit has made does not stay.
    pub(super) fn release(self) -> Result<()> {
        if self.had_file() { Ok(()) } else { self.unlink() }
    }

    /// Releases the lock and removes its file.
    pub(super) fn unlink(self) -> Result<()> {
        match self {
            Self::Exclusive(lock) => lock.unlink(),
            Self::Shared(_) => Ok(()),
        }
    }
}
