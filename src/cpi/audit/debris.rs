//! Small things that belong to nothing.

use super::hold::is_left;
use super::{Audit, Kind};
use crate::error::Result;
use crate::store::{Rank, atomic};

impl Audit<'_> {
    pub(super) fn debris(&mut self) -> Result<()> {
        self.locks()?;
        for path in self.cpi.store.temporary_files()? {
            // One that is being written is replaced within milliseconds.
            if is_left(&path, None) {
                self.found(Kind::Orphan, &path.display(), "it was never finished", || atomic::remove_file(&path));
            }
        }
        Ok(())
    }

    /// Locks of objects that are gone. A VM's is the last of what names it.
    fn locks(&mut self) -> Result<()> {
        let store = &self.cpi.store;
        for (rank, name) in store.locks()? {
            let is_somethings = || store.is_locked_for_something(rank, &name) || self.cpi.is_noted(&name);
            let is_left = || is_left(&store.lock_path(rank, &name), store.last_holder(rank, &name));
            if rank == Rank::Vm || is_somethings() || !is_left() {
                continue;
            }
            let Some(hold) = self.hold(rank, &name) else { continue };
            if hold.had_file() && !is_somethings() {
                let what = format!("lock {}.{name}", rank.as_str());
                self.found(Kind::Orphan, &what, "what it is for is gone", || hold.retire());
            }
        }
        Ok(())
    }
}
