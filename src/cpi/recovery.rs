//! Recovery of creates that SIGKILL or a power cut ended: their callers have no cid to delete the
//! object with.
//!
//! [`Cpi`](super::Cpi) runs it before every create. Each pending note whose process is dead goes to
//! the object's own recovery, which rolls the create back, or settles the copy of a disk. Usually
//! there is no note, and this costs one look at an empty directory.

use std::time::{Duration, Instant};

use super::context::Context;
use super::creation::pending;
use super::{disk, network, stemcell, vm};
use crate::cid::{Cid, DiskCid, NetworkCid, SnapshotCid, StemcellCid, VmCid};
use crate::error::{Error, ErrorKind, Result};

/// How long the recovery of one object may delay the create that runs it.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(30);

/// Recovers what earlier calls left, in half of the time until `deadline`. What cannot be recovered
/// is logged and left to the next create: it must not fail this one.
pub(super) fn run(cx: &Context, deadline: Instant) {
    let notes = pending::names(cx);
    if notes.is_empty() || cx.store.prepare().is_err() {
        // The create that follows reports a state directory that it cannot use.
        return;
    }
    let until = Instant::now() + deadline.saturating_duration_since(Instant::now()) / 2;
    for name in notes {
        if Instant::now() >= until {
            return tracing::warn!("no time to recover all objects that killed calls have left");
        }
        if pending::is_starting(cx, &name) {
            continue;
        }
        match recover(cx, &name, until.min(Instant::now() + RECOVERY_TIMEOUT)) {
            Ok(()) => {}
            // Its create still works.
            Err(error) if error.kind() == ErrorKind::Timeout => {}
            Err(error) => {
                tracing::warn!(cid = name, error = error.report(), "cannot recover the object");
            }
        }
    }
}

/// Rolls back a create, finishes a delete or settles a copy that was interrupted, of the object
/// called `name`.
///
/// # Errors
/// [`ErrorKind::Timeout`] if a call works on the object.
pub(crate) fn recover(cx: &Context, name: &str, deadline: Instant) -> Result<()> {
    match name.split('-').next() {
        Some(VmCid::PREFIX) => vm::recover(cx, &cid(name)?, deadline),
        Some(SnapshotCid::PREFIX) => disk::recover_snapshot(cx, &cid(name)?, deadline),
        Some(DiskCid::PREFIX) => disk::recover(cx, &cid(name)?, deadline),
        Some(StemcellCid::PREFIX) => stemcell::recover(cx, &cid(name)?),
        Some(NetworkCid::PREFIX) => network::recover(cx, &cid(name)?),
        _ => Err(not_a_cid(name)),
    }
}

fn cid<C: Cid>(name: &str) -> Result<C> {
    C::parse(name).map_err(|e| not_a_cid(name).because(e))
}

fn not_a_cid(name: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("'{}' is no cid of this CPI", name.escape_debug()))
        .hint("remove the link of that name from 'pending' in the state directory")
}
