//! Locks and temporary files that belong to no object.

use std::ffi::OsStr;
use std::path::Path;

use super::{Audit, Kind};
use crate::cpi::creation::pending;
use crate::error::Result;
use crate::store::{Rank, atomic};

impl Audit<'_> {
    pub(super) fn stray_files(&mut self) -> Result<()> {
        self.locks()?;
        for path in self.cx.store.temporary_files()? {
            // A temporary file is renamed within milliseconds, or when a guest has released a disk.
            if pending::is_abandoned(&path, None) && !self.is_worked_on(&path) {
                self.found(
                    Kind::Orphan,
                    &path.display(),
                    "it is a temporary file of a call that was interrupted",
                    || atomic::remove_file(&path),
                );
            }
        }
        Ok(())
    }

    /// Whether a call works on the object in whose directory the file is. detach_disk stages the
    /// records that it will write while it waits for the guest.
    fn is_worked_on(&mut self, file: &Path) -> bool {
        let object = file.parent().and_then(Path::file_name).and_then(OsStr::to_str);
        object
            .and_then(pending::lock_of)
            .is_some_and(|(rank, lock_name)| self.lock_object(rank, lock_name).is_none())
    }

    /// Lock files of objects that do not exist, but for those of VMs: `vms_without_record` needs
    /// them, for they name what is left of a VM.
    fn locks(&mut self) -> Result<()> {
        let cx = self.cx;
        for (rank, name) in cx.store.locks()? {
            let is_used =
                || cx.store.lock_has_object(rank, &name) || pending::contains_name(cx, &name);
            let is_abandoned = || {
                let (path, holder) =
                    (cx.store.lock_path(rank, &name), cx.store.last_holder(rank, &name));
                pending::is_abandoned(&path, holder)
            };
            if rank == Rank::Vm || is_used() || !is_abandoned() {
                continue;
            }
            let Some(lock) = self.lock(rank, &name) else { continue };
            if !lock.had_file() {
                // It was removed meanwhile, and made again by this audit.
                lock.unlink()?;
            } else if !is_used() {
                let what = format!("lock {}.{name}", rank.as_str());
                self.found(Kind::Orphan, &what, "its object does not exist", || lock.unlink());
            }
        }
        Ok(())
    }
}
