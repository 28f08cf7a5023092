//! Something that nobody works on, and nobody begins to while it is looked at.

use std::fmt::Display;
use std::time::Instant;

use super::Audit;
use crate::error::{ErrorKind, Result};
use crate::store::{Guard, Rank, TryLock};

/// Kept as long as the thing is looked at.
pub(super) enum Hold {
    /// Its lock, as who changes something must have it.
    Lock(Guard),
    /// For who only looks, on whatever filesystem.
    Look(TryLock),
}

impl Audit<'_> {
    /// Holds an object; `None` as for [`Self::hold`], and if it is gone since it was listed.
    pub(super) fn idle(&mut self, rank: Rank, name: impl Display) -> Option<Hold> {
        let name = name.to_string();
        let hold = self.hold(rank, &name)?;
        if self.cpi.store.lock_has_object(rank, &name) {
            return Some(hold);
        }
        // One that was there before is a name of what may be left.
        if !hold.had_file()
            && let Err(error) = hold.unlink()
        {
            tracing::warn!(error = error.report(), "a lock of nothing stays");
        }
        None
    }

    /// Holds whatever may be there; `None` if a call works on it, or if its lock can not be used, which is a finding.
    pub(super) fn hold(&mut self, rank: Rank, name: impl Display) -> Option<Hold> {
        let store = &self.cpi.store;
        let held = if self.mend {
            store.lock(rank, &name, Instant::now()).map(|lock| Some(Hold::Lock(lock)))
        } else {
            store.try_lock(rank, &name).map(|glance| glance.map(Hold::Look))
        };
        match held {
            Err(error) if error.kind() == ErrorKind::Timeout => None,
            Err(error) => {
                let what = format!("lock {}.{name}", rank.as_str());
                // It is asked for more than once.
                if !self.findings.iter().any(|finding| finding.what == what) {
                    self.unusable(&what, &error);
                }
                None
            }
            Ok(hold) => hold,
        }
    }
}

impl Hold {
    /// The lock of a thing that is mended.
    pub(super) fn lock(&self) -> &Guard {
        match self {
            Self::Lock(lock) => lock,
            Self::Look(_) => unreachable!("nothing is mended by who only looks"),
        }
    }

    /// Whether the lock was there before.
    pub(super) fn had_file(&self) -> bool {
        match self {
            Self::Lock(lock) => !lock.is_new(),
            Self::Look(glance) => glance.has_file(),
        }
    }

    /// Releases it; a lock file that is there only for this goes, too.
    pub(super) fn unlink(self) -> Result<()> {
        match self {
            Self::Lock(lock) => lock.unlink(),
            Self::Look(_) => Ok(()),
        }
    }
}
