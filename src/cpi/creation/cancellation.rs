//! Creates that are cancelled, perhaps before they begin: the CPI on the caller's machine lost the
//! link, and asks over another for the deletion of the cid that it chose.
//!
//! ```text
//!   create:   pending note ─► lock ─► tombstone? ─► record …
//!   delete:   tombstone ─► is there a lock or a record? ─► wait for it, remove the object
//! ```
//!
//! Whichever runs second sees the first. A delayed request may still arrive, so the tombstone
//! `called-off/<cid>` in the run directory is kept for a day. A reboot ends every delayed request
//! and clears the run directory.

use std::fs::{DirEntry, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::pending;
use crate::cid::Cid;
use crate::cpi::context::Context;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::store::{Rank, atomic};

/// How long a tombstone is kept: longer than a create can take from its request to its lock.
const TOMBSTONE_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// Cancels a create of `cid` that has not begun, if this call is such a cancellation.
pub(in crate::cpi) fn cancel(cx: &Context, cid: &impl Cid) -> Result<()> {
    if !cx.remote.as_ref().is_some_and(|remote| remote.cancels) {
        return Ok(());
    }
    cx.store.prepare()?;
    let dir = directory(cx);
    atomic::make_dir(&dir)?;
    remove_expired(&dir);
    let path = dir.join(cid);
    File::create(&path).at("make", &path)?;
    // delete_network looks for a record, not for a lock: it must not run before the create has
    // written one.
    match pending::lock_of(cid.as_str()) {
        Some((Rank::Network, bridge)) if pending::contains(cx, cid) => {
            cx.store.short_lock(Rank::Network, bridge, cx.deadline("delete_network")).map(drop)
        }
        _ => Ok(()),
    }
}

/// Refuses to create what was cancelled.
///
/// # Errors
/// [`ErrorKind::Conflict`] if there is a tombstone for `cid`.
pub(super) fn ensure_not_cancelled(cx: &Context, cid: &impl Cid) -> Result<()> {
    if !atomic::entry_exists(&directory(cx).join(cid)) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Conflict,
        format!("the caller has cancelled the creation of '{cid}'"),
    )
    .hint("repeat the call: it gets another cid"))
}

fn directory(cx: &Context) -> PathBuf {
    cx.store.run_dir().join("called-off")
}

fn remove_expired(dir: &Path) {
    let is_expired = |entry: &DirEntry| {
        let modified = entry.metadata().and_then(|meta| meta.modified()).ok();
        let age = modified.and_then(|modified| modified.elapsed().ok());
        age.is_some_and(|age| age > TOMBSTONE_TIMEOUT)
    };
    for entry in dir.read_dir().into_iter().flatten().flatten().filter(is_expired) {
        // The next cancellation tries again.
        let _ = std::fs::remove_file(entry.path());
    }
}
