//! Small things that belong to nothing.

use std::path::Path;
use std::time::{Duration, SystemTime};

use super::{Audit, Kind};
use crate::cid::{Cid, VmCid};
use crate::error::Result;
use crate::host::uids;
use crate::store::{Rank, atomic};

/// A file that is being written is replaced within milliseconds.
const ABANDONED: Duration = Duration::from_secs(60);

impl Audit<'_> {
    pub(super) fn debris(&mut self) -> Result<()> {
        self.uids()?;
        self.locks()?;
        for path in self.cpi.store.temporary_files()? {
            if is_abandoned(&path) {
                self.found(Kind::Orphan, &path.display(), "it was never finished", || atomic::remove_file(&path));
            }
        }
        Ok(())
    }

    fn uids(&mut self) -> Result<()> {
        let state_dir = self.cpi.store.state_dir();
        for (uid, owner) in uids::claims(state_dir)? {
            let Some(vm) = owner.to_str().and_then(|owner| VmCid::parse(owner).ok()) else { continue };
            if self.cpi.store.vm(&vm).dir.exists() {
                continue;
            }
            let Some(lock) = self.idle(Rank::Vm, &vm)? else { continue };
            if !self.cpi.store.vm(&vm).dir.exists() {
                self.found(Kind::Orphan, &format!("uid {uid}"), &format!("its VM '{vm}' is gone"), || {
                    uids::release(state_dir, &vm, uid)
                });
                lock.retire()?;
            }
        }
        Ok(())
    }

    /// Locks of objects that are gone.
    fn locks(&mut self) -> Result<()> {
        for (rank, name) in self.cpi.store.locks()? {
            if self.cpi.store.is_locked_for_something(rank, &name) {
                continue;
            }
            let Some(lock) = self.idle(rank, &name)? else { continue };
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
