//! The one way in which an object comes to be: a VM, a disk, a snapshot, a stemcell, a managed
//! network.
//!
//! ```text
//!   begin      pending/<cid> ─► the object's lock ─► cancelled? ─► pending/<cid> again
//!   work       record `creating` ─► images, processes, links: everything that the record names
//!   commit     marker `untold` ─► record `ready`, durable ─► pending/<cid> removed
//!   roll back  everything that the record names ─► record ─► lock ─► pending/<cid>
//! ```
//!
//! A call that is killed in `begin` or `work` leaves a pending note whose process is dead. The next
//! create on this host finds it and rolls back ([`recovery`](super::recovery)). A call that is
//! killed after `commit` leaves a complete object whose caller may not know its cid: the marker
//! says so ([`acknowledgement`]).
//!
//! A new kind of object implements [`Creatable`], and has its prefix in [`pending::lock_of`] and in
//! [`recovery`](super::recovery). Acknowledgement, cancellation, roll-back and crash points come
//! with that.

pub mod acknowledgement;
pub mod cancellation;
pub mod pending;

use std::time::{Duration, Instant};

use crate::cid::Cid;
use crate::cpi::context::Context;
use crate::crash;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Guard, Phase, Record, atomic};

/// A kind of object that calls create.
pub(super) trait Creatable: Record {
    /// How long rolling back may take once the call's deadline has passed.
    const ROLL_BACK_TIMEOUT: Duration = Duration::from_secs(3);

    /// Writes the record of the complete object. Durable when it returns.
    fn write_ready(&self, cx: &Context) -> Result<()> {
        cx.store.write(self)
    }

    /// Removes all that a create has made: the record last, then the object's lock, then the
    /// pending note.
    fn roll_back(cx: &Context, cid: &Self::Cid, lock: Guard, _deadline: Instant) -> Result<()> {
        cx.store.remove::<Self>(cid)?;
        lock.unlink()?;
        pending::remove(cx, cid)
    }
}

/// An object that is being created. Its lock is held until [`Creation::run`] has ended.
#[must_use = "only `run` commits or rolls back"]
pub(super) struct Creation<'a, R: Creatable> {
    cx: &'a Context,
    cid: R::Cid,
    lock: Guard,
    deadline: Instant,
}

impl<'a, R: Creatable> Creation<'a, R> {
    /// Begins to create an object with a new cid, as [`Self::begin_with`].
    pub fn begin(cx: &'a Context, deadline: Instant) -> Result<Self> {
        Self::begin_with(cx, new_cid::<R>(cx)?, deadline)
    }

    /// Begins to create the object `cid`.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if the object exists, if another call creates it, or if its creation
    /// was cancelled: a CPI on another machine chooses cids and may repeat them.
    pub fn begin_with(cx: &'a Context, cid: R::Cid, deadline: Instant) -> Result<Self> {
        cx.store.prepare()?;
        let exists = || Error::new(ErrorKind::Conflict, format!("'{cid}' exists already"));
        if !pending::add(cx, &cid)? {
            return Err(exists());
        }
        crash::point!("pending noted");
        let lock = match cx.store.lock(R::RANK, R::lock_name(&cid), deadline) {
            Ok(lock) => lock,
            Err(error) => return pending::remove(cx, &cid).and(Err(error)),
        };
        if atomic::entry_exists(&cx.store.record_dir::<R>(&cid)) {
            release::<R>(lock);
            return pending::remove(cx, &cid).and(Err(exists()));
        }
        // Until this call had the lock, another create could take the note for an abandoned one and
        // remove it.
        let begun = cancellation::ensure_not_cancelled(cx, &cid)
            .and_then(|()| pending::add(cx, &cid).map(drop));
        match begun {
            Ok(()) => Ok(Self { cx, cid, lock, deadline }),
            Err(error) => lock.unlink().and(pending::remove(cx, &cid)).and(Err(error)),
        }
    }

    /// The cid of the object.
    pub fn cid(&self) -> &R::Cid {
        &self.cid
    }

    /// The lock of the object.
    pub fn lock(&self) -> &Guard {
        &self.lock
    }

    /// Does the `work`, which writes the record in phase `creating` before anything that the record
    /// names, and returns it. Then the object is complete, durable and ready.
    ///
    /// # Errors
    /// Those of `work` and of the commit, each as `explain` puts it, once everything is rolled
    /// back. If the roll-back fails, its own error, which includes the first: the pending note
    /// stays, and the next create repeats the roll-back.
    pub fn run(
        self,
        work: impl FnOnce(&Self) -> Result<R>,
        explain: impl FnOnce(Error) -> Error,
    ) -> Result<R> {
        match work(&self).and_then(|record| self.commit(record)) {
            Ok(record) => Ok(self.finish(record)),
            Err(error) => {
                let failed = explain(error);
                let deadline = self.deadline.max(Instant::now() + R::ROLL_BACK_TIMEOUT);
                R::roll_back(self.cx, &self.cid, self.lock, deadline)
                    .map_err(|e| e.during(format!("roll back after: {}", failed.report())))?;
                Err(failed)
            }
        }
    }

    /// Makes the object durable and ready.
    fn commit(&self, mut record: R) -> Result<R> {
        acknowledgement::mark::<R>(self.cx, &self.cid)?;
        record.set_phase(Phase::Ready);
        record.write_ready(self.cx)?;
        Ok(record)
    }

    /// Releases the lock and removes the pending note. The object is ready, so a note that cannot
    /// be removed is left to recovery. The file of a short lock is unlinked while the note still
    /// leads to it.
    fn finish(self, record: R) -> R {
        let (cx, cid) = (self.cx, self.cid);
        let _lock = match R::LOCK_IS_SHORT {
            true => {
                drop(self.lock.into_short_lock());
                None
            }
            false => Some(self.lock),
        };
        if let Err(error) = pending::remove(cx, &cid) {
            tracing::warn!(%cid, error = error.report(), "cannot remove a pending note");
        }
        record
    }
}

/// Releases the lock of an object that this call has not made.
fn release<R: Record>(lock: Guard) {
    if R::LOCK_IS_SHORT {
        drop(lock.into_short_lock());
    }
}

/// The cid of the object that this call creates: a random one, or the one that a CPI on another
/// machine chose.
///
/// # Errors
/// [`ErrorKind::BadRequest`] for a chosen cid that this version would not make.
pub(super) fn new_cid<R: Record>(cx: &Context) -> Result<R::Cid> {
    let Some(chosen) = cx.remote.as_ref().and_then(|remote| remote.cid.as_deref()) else {
        return Ok(R::Cid::random());
    };
    R::Cid::parse_generated(chosen)
        .map_err(|e| Error::new(ErrorKind::BadRequest, "the new cid").because(e))
}

/// Makes an object ready again whose deletion was refused because it is used.
pub(super) fn reinstate<R: Creatable>(cx: &Context, mut record: R) -> Result<()> {
    record.set_phase(Phase::Ready);
    record.write_ready(cx)
}
