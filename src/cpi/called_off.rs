//! Creates that are called off, perhaps before they begin: their caller lost the link, and asks over another for the removal
//! of what it has a cid for.
//!
//! ```text
//!   create:   pending note ─► lock ─► called off? ─► record …
//!   removal:  called off ──► is there a lock or a record? ─► wait for it, remove it
//! ```
//!
//! Whichever is first, one of the two sees the other. A question can be on its way for as long as a machine is slow, so the
//! file `called-off/<cid>` in the run directory stays for a day. After a reboot there is no create that it could stop.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use super::Cpi;
use super::leftovers::lock_of;
use crate::cid::Cid;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::store::{Rank, atomic};

/// How long a create may take to begin after it was asked for.
const STAYS: Duration = Duration::from_secs(24 * 3600);

impl Cpi {
    fn called_off_dir(&self) -> PathBuf {
        self.store.run_dir().join("called-off")
    }

    /// Has a create of `cid` that did not begin yet never begin, if this call undoes one.
    pub(super) fn call_off(&self, cid: &impl Cid) -> Result<()> {
        if !self.afar.as_ref().is_some_and(|afar| afar.undoes) {
            return Ok(());
        }
        self.store.prepare()?;
        let dir = self.called_off_dir();
        atomic::make_dir(&dir)?;
        self.forget_old(&dir);
        let path = dir.join(cid);
        File::create(&path).at("make", &path)?;
        // A network has no lock of its own that its removal would look for before there is a record.
        match lock_of(cid.as_str()) {
            Some((Rank::Network, bridge)) if self.has_note(cid) => self
                .store
                .short_lock(Rank::Network, bridge, self.deadline("delete_network"))
                .map(drop),
            _ => Ok(()),
        }
    }

    /// Refuses to make what was called off.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if it was.
    pub(super) fn is_wanted(&self, cid: &impl Cid) -> Result<()> {
        if !atomic::entry_exists(&self.called_off_dir().join(cid)) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Conflict, format!("'{cid}' was called off by who asked for it")))
    }

    fn forget_old(&self, dir: &std::path::Path) {
        let old = |entry: &std::fs::DirEntry| {
            let age = entry
                .metadata()
                .and_then(|meta| meta.modified())
                .ok()
                .and_then(|made| made.elapsed().ok());
            age.is_some_and(|age| age > STAYS)
        };
        for entry in dir.read_dir().into_iter().flatten().flatten().filter(old) {
            // The next removes what this one can not.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}
