//! Creates that were cut short by SIGKILL or a power cut: nobody was told their cid, so nobody can ask for their removal.
//!
//! A copy of a disk that is being made for an update_disk is noted in the same way: if the call is killed, QEMU goes on
//! copying, or holds the guest's I/O back.
//!
//! While a create works there is a link `pending/<cid>`, made before the object's lock and removed when its record is
//! ready, or when all of it is gone, the lock included. Its text is the number of the process, for who only looks. The next
//! create finds those whose lock is free, and finishes the removal. In the usual case that costs one look at an empty
//! directory, however many objects there are.

use std::fmt::Display;
use std::fs::Metadata;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use super::Cpi;
use crate::cid::{Cid, DiskCid, NetworkCid, SnapshotCid, StemcellCid, VmCid};
use crate::crash;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::store::record::NetworkRecord;
use crate::store::{DiskRecord, Guard, Phase, Rank, Record, StemcellRecord, VmRecord, atomic};
use crate::sys::pidfd::Process;

/// What is being written, or about to be locked, is so for milliseconds.
const ABANDONED: Duration = Duration::from_secs(60);

/// How long removing one leftover may hold up the create that found it.
const PATIENCE: Duration = Duration::from_secs(30);

impl Cpi {
    fn pending(&self, cid: &impl Cid) -> PathBuf {
        self.store.pending_dir().join(cid)
    }

    /// Notes that `cid` is being made, and takes its lock.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if somebody else makes it, or has, or if it was called off: callers on other machines choose
    /// cids.
    pub(super) fn begin<R: Record>(
        &self,
        rank: Rank,
        cid: &R::Cid,
        deadline: Instant,
    ) -> Result<Guard> {
        self.begin_under::<R>(rank, cid, cid, deadline)
    }

    /// The same for an object whose lock has another name.
    pub(super) fn begin_under<R: Record>(
        &self,
        rank: Rank,
        lock: impl Display,
        cid: &R::Cid,
        deadline: Instant,
    ) -> Result<Guard> {
        let taken = || Error::new(ErrorKind::Conflict, format!("there is a '{cid}' already"));
        if !self.note(cid)? {
            return Err(taken());
        }
        crash::point!("pending noted");
        let lock = self.store.lock(rank, lock, deadline)?;
        if atomic::entry_exists(&self.store.record_dir::<R>(cid)) {
            return self.settled(cid).and(Err(taken()));
        }
        if let Err(unwanted) = self.is_wanted(cid) {
            return lock.unlink().and(self.settled(cid)).and(Err(unwanted));
        }
        // Until there was a lock, another create could take the note for a leftover, and remove it.
        self.note(cid)?;
        Ok(lock)
    }

    /// Notes that there is something to finish about `cid`. Whether there was no such note.
    pub(super) fn note(&self, cid: &impl Cid) -> Result<bool> {
        let path = self.pending(cid);
        match symlink(std::process::id().to_string(), &path) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
            made => made.at("make", &path).map(|()| true),
        }
    }

    /// Notes that `cid` is made, or that nothing of it is left, not even its lock.
    pub(super) fn settled(&self, cid: &impl Cid) -> Result<()> {
        atomic::remove_file(&self.pending(cid))?;
        crash::point!("pending note removed");
        Ok(())
    }

    /// What is being made of one kind, this call's own included.
    pub(super) fn in_the_making<R: Record>(&self) -> Result<Vec<R::Cid>> {
        let dir = self.store.pending_dir();
        let entries = match dir.read_dir() {
            // Nothing was ever made.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.at("list", &dir)?,
        };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let ours = names.filter(|name| name.split('-').next() == Some(R::Cid::PREFIX));
        Ok(ours.filter_map(|name| R::Cid::parse(&name).ok()).collect())
    }

    /// Removes what creates left that were cut short. What can not be removed now, in half of the time until this one's
    /// `deadline`, is left for the next create: it must not fail this one.
    pub(super) fn clear_leftovers(&self, deadline: Instant) {
        let until = Instant::now() + deadline.saturating_duration_since(Instant::now()) / 2;
        for name in self.notes() {
            if Instant::now() >= until {
                return tracing::warn!(
                    "there are leftovers of calls that were cut short, and no time to remove them"
                );
            }
            if self.may_begin(&name) {
                continue;
            }
            match self.clear_leftover(&name, until.min(Instant::now() + PATIENCE)) {
                Ok(()) => {}
                // Its create still works.
                Err(error) if error.kind() == ErrorKind::Timeout => {}
                Err(error) => tracing::warn!(
                    cid = name,
                    error = error.report(),
                    "a leftover can not be removed"
                ),
            }
        }
    }

    /// What creates noted that have not ended, or were cut short.
    pub(super) fn notes(&self) -> Vec<String> {
        let names = self.store.pending_dir().read_dir().into_iter().flatten().flatten();
        names.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// Whether a create of `cid` noted that it began, and not that it ended.
    pub(super) fn has_note(&self, cid: &impl Cid) -> bool {
        self.is_noted(cid.as_str())
    }

    /// The same by name.
    pub(super) fn is_noted(&self, name: &str) -> bool {
        atomic::entry_exists(&self.store.pending_dir().join(name))
    }

    /// Whether the create that made the note lives, and may not have its lock yet. Who took that first would remove the note
    /// last, when the create has the lock and relies on it.
    pub(super) fn may_begin(&self, note: &str) -> bool {
        let maker = self.noted_by(note);
        maker.is_some() && !is_left(&self.store.pending_dir().join(note), maker)
    }

    /// The process that made the note.
    pub(super) fn noted_by(&self, note: &str) -> Option<i32> {
        std::fs::read_link(self.store.pending_dir().join(note)).ok()?.to_str()?.parse().ok()
    }

    /// Removes one of them, or whatever is left of an object whose create or removal was cut short.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] if a call works on it.
    pub(super) fn clear_leftover(&self, name: &str, deadline: Instant) -> Result<()> {
        match name.split('-').next() {
            Some(VmCid::PREFIX) => self.clear_vm(&cid(name)?, deadline),
            Some(SnapshotCid::PREFIX) => self.clear_snapshot(&cid(name)?, deadline),
            Some(DiskCid::PREFIX) => self.clear_disk(&cid(name)?, deadline),
            Some(StemcellCid::PREFIX) => self.clear_stemcell(&cid(name)?),
            Some(NetworkCid::PREFIX) => self.clear_network(&cid(name)?),
            _ => Err(Error::new(ErrorKind::Corrupt, "it is none of ours")),
        }
    }

    fn clear_vm(&self, cid: &VmCid, deadline: Instant) -> Result<()> {
        let lock = self.store.lock(Rank::Vm, cid, Instant::now())?;
        match self.store.find::<VmRecord>(cid)? {
            // Deleting: its create failed, and was cut short while it cleaned up.
            Some(vm) if vm.phase != Phase::Ready => {
                tracing::warn!(%cid, "removing a VM whose create_vm was cut short");
                return self.destroy(&vm, lock, deadline);
            }
            Some(_) => {}
            None => {
                self.remove_remains(cid)?;
                return self.forget(cid, &self.store.vm(cid), lock);
            }
        }
        self.settled(cid)
    }

    fn clear_network(&self, cid: &NetworkCid) -> Result<()> {
        let lock = self.store.short_lock(
            Rank::Network,
            super::managed_networks::bridge(cid),
            Instant::now(),
        )?;
        if self
            .store
            .find::<NetworkRecord>(cid)?
            .is_none_or(|network| network.phase == Phase::Creating)
        {
            tracing::warn!(%cid, "removing a network whose create_network was cut short");
            self.unmake_network(cid)?;
        }
        drop(lock);
        self.settled(cid)
    }

    fn clear_disk(&self, cid: &DiskCid, deadline: Instant) -> Result<()> {
        let lock = self.store.lock(Rank::Disk, cid, Instant::now())?;
        let mut disk = self.store.find::<DiskRecord>(cid)?;
        let is_cut_short = |disk: &&mut DiskRecord| {
            disk.inactive_image.is_some() && !self.store.is_no_longer_owned(disk)
        };
        if let Some(disk) = disk.as_mut().filter(is_cut_short) {
            tracing::warn!(%cid, "settling a copy of a disk by an update_disk that was cut short");
            self.settle_copy(disk, deadline)?;
        }
        if disk.is_none_or(|disk| disk.phase != Phase::Ready) {
            tracing::warn!(%cid, "removing a disk whose creation or removal was cut short");
            let metadata = self.store.lock(Rank::Metadata, cid, deadline)?;
            self.forget_disk(cid, lock, metadata)?;
        }
        self.settled(cid)
    }

    fn clear_stemcell(&self, cid: &StemcellCid) -> Result<()> {
        let lock = self.store.lock(Rank::Stemcell, cid, Instant::now())?;
        if self
            .store
            .find::<StemcellRecord>(cid)?
            .is_none_or(|stemcell| stemcell.phase != Phase::Ready)
        {
            tracing::warn!(%cid, "removing a stemcell whose creation or removal was cut short");
            self.store.remove::<StemcellRecord>(cid)?;
            lock.unlink()?;
        }
        self.settled(cid)
    }
}

/// Whether nobody is between making a note or a lock file, at `path`, and having the lock: who made it, `maker`, is dead, or
/// made it long ago.
pub(super) fn is_left(path: &Path, maker: Option<i32>) -> bool {
    let age = |meta: Metadata| SystemTime::now().duration_since(meta.modified().ok()?).ok();
    let is_old = path.symlink_metadata().ok().and_then(age).is_some_and(|age| age > ABANDONED);
    let lives = |pid| {
        Process::open(pid).is_ok_and(|process| !process.wait_exit(Instant::now()).unwrap_or(true))
    };
    is_old || maker.is_some_and(|pid| !lives(pid))
}

/// The lock of the object that a note is about; `None` if it is about none of ours.
pub(super) fn lock_of(note: &str) -> Option<(Rank, String)> {
    let rank = match note.split('-').next()? {
        VmCid::PREFIX => Rank::Vm,
        SnapshotCid::PREFIX => Rank::Snapshot,
        DiskCid::PREFIX => Rank::Disk,
        StemcellCid::PREFIX => Rank::Stemcell,
        NetworkCid::PREFIX => {
            return Some((Rank::Network, super::managed_networks::bridge(&cid(note).ok()?)));
        }
        _ => return None,
    };
    Some((rank, note.to_owned()))
}

fn cid<C: Cid>(name: &str) -> Result<C> {
    C::parse(name).map_err(|e| Error::new(ErrorKind::Corrupt, "it is no cid").because(e))
}
