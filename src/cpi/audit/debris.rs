//! Small things that belong to nothing.

use std::ffi::OsStr;
use std::path::Path;

use super::{Audit, Kind};
use crate::cpi::leftovers;
use crate::cpi::leftovers::is_left;
use crate::error::Result;
use crate::store::{Rank, atomic};

impl Audit<'_> {
    pub(super) fn debris(&mut self) -> Result<()> {
        self.locks()?;
        for path in self.cpi.store.temporary_files()? {
            // One that is being written is replaced within milliseconds, or when a guest has let go of a disk.
            if is_left(&path, None) && !self.is_worked_on(&path) {
                self.found(Kind::Orphan, &path.display(), "it was never finished", || {
                    atomic::remove_file(&path)
                });
            }
        }
        Ok(())
    }

    /// Whether a call works on the object in whose directory the file is. A detach_disk has what it will write in the end
    /// on the filesystem while it waits for the guest.
    fn is_worked_on(&mut self, file: &Path) -> bool {
        let object = file.parent().and_then(Path::file_name).and_then(OsStr::to_str);
        object
            .and_then(leftovers::lock_of)
            .is_some_and(|(rank, lock)| self.idle(rank, lock).is_none())
    }

    /// Locks of objects that are gone. A VM's is the last of what names it.
    fn locks(&mut self) -> Result<()> {
        let store = &self.cpi.store;
        for (rank, name) in store.locks()? {
            let is_somethings = || store.lock_has_object(rank, &name) || self.cpi.is_noted(&name);
            let is_left = || is_left(&store.lock_path(rank, &name), store.last_holder(rank, &name));
            if rank == Rank::Vm || is_somethings() || !is_left() {
                continue;
            }
            let Some(hold) = self.hold(rank, &name) else { continue };
            if !hold.had_file() {
                // It went while we looked, and is there again for that alone.
                hold.unlink()?;
            } else if !is_somethings() {
                let what = format!("lock {}.{name}", rank.as_str());
                self.found(Kind::Orphan, &what, "what it is for is gone", || hold.unlink());
            }
        }
        Ok(())
    }
}
