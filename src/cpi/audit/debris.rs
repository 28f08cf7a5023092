//! Small things that belong to nothing.

use std::path::Path;
use std::time::{Duration, SystemTime};

use super::{Audit, Kind};
use crate::error::Result;
use crate::store::{Rank, atomic};

/// A file that is being written is replaced within milliseconds.
const ABANDONED: Duration = Duration::from_secs(60);

impl Audit<'_> {
    pub(super) fn debris(&mut self) -> Result<()> {
        self.locks()?;
        for path in self.cpi.store.temporary_files()? {
            if is_abandoned(&path) {
                self.found(Kind::Orphan, &path.display(), "it was never finished", || atomic::remove_file(&path));
            }
        }
        Ok(())
    }

    /// Locks of objects that are gone. A VM's is the last of what names it.
    fn locks(&mut self) -> Result<()> {
        for (rank, name) in self.cpi.store.locks()? {
            if rank == Rank::Vm || self.cpi.store.is_locked_for_something(rank, &name) {
                continue;
            }
            let Some(lock) = self.idle(rank, &name) else { continue };
            if !self.cpi.store.is_locked_for_something(rank, &name) {
                let what = format!("lock {}.{name}", rank.as_str());
                self.found(Kind::Orphan, &what, "what it is for is gone", || lock.retire());
            }
        }
        Ok(())
    }
}

fn is_abandoned(path: &Path) -> bool {
    let age = |meta: std::fs::Metadata| SystemTime::now().duration_since(meta.modified().ok()?).ok();
    path.symlink_metadata().ok().and_then(age).is_some_and(|age| age > ABANDONED)
}
