//! Disks in shared pools on their way from one host to another: whoever is asked for one that is nobody's takes it.

use std::path::Path;
use std::time::Instant;

use super::Cpi;
use crate::cid::DiskCid;
use crate::error::{Error, ErrorKind, Result};
use crate::image;
use crate::store::{DiskRecord, Rank, VmRecord, atomic};

impl Cpi {
    /// The record of a disk that exists and is this host's. One that is nobody's becomes so.
    ///
    /// # Errors
    /// [`ErrorKind::DiskNotFound`]; [`ErrorKind::Conflict`] if another host has it now.
    pub(super) fn own_disk(&self, cid: &DiskCid, deadline: Instant) -> Result<DiskRecord> {
        self.adopt(cid, deadline)?;
        if self.store.find::<DiskRecord>(cid)?.is_none() {
            self.store.ensure_not_owned_elsewhere(cid)?;
        }
        let disk = self.disk(cid)?;
        self.store.ensure_owned(&disk)?;
        Ok(disk)
    }

    /// Takes a disk that is nobody's, if it is one. A record of it from before it was given up is out of date.
    pub(super) fn adopt(&self, cid: &DiskCid, deadline: Instant) -> Result<()> {
        let can_be_had = || match self.store.find::<DiskRecord>(cid)? {
            Some(disk) => Ok(self.store.has_no_owner(&disk)? && !self.is_listed(cid)?),
            None => self.store.can_take(cid),
        };
        if !can_be_had()? {
            return Ok(());
        }
        self.store.prepare()?;
        let lock = self.disk_lock(cid, deadline)?;
        if !can_be_had()? {
            return if self.store.find::<DiskRecord>(cid)?.is_some() {
                Ok(())
            } else {
                lock.unlink()
            };
        }
        let metadata = self.store.lock(Rank::Metadata, cid, deadline)?;
        self.store.remove_local(cid)?;
        metadata.unlink()?;
        match self.store.take_unowned(cid) {
            Ok(true) => {
                tracing::info!(%cid, "the disk was nobody's, and is this host's now");
                Ok(())
            }
            other => lock.unlink().and(other.map(drop)),
        }
    }

    /// Whether a VM here has the disk by its own record, which decides.
    fn is_listed(&self, disk: &DiskCid) -> Result<bool> {
        Ok(self.store.list_readable::<VmRecord>()?.iter().any(|vm| vm.attachment(disk).is_some()))
    }

    /// Makes the disk nobody's, so that another host can have it.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if something here uses it, or no other host reaches it; [`ErrorKind::DiskNotFound`].
    pub fn give_up_disk(&self, cid: &DiskCid) -> Result<()> {
        let deadline = self.deadline("attach_disk");
        if self.store.find::<DiskRecord>(cid)?.is_none() && self.store.can_take(cid)? {
            // It was given up, or that was cut short.
            let lock = self.disk_lock(cid, deadline)?;
            if self.store.find::<DiskRecord>(cid)?.is_none() {
                self.store.remove_record::<DiskRecord>(cid)?;
                return self.store.finish_release(cid).and(lock.unlink());
            }
        }
        let refused = |why: String| Error::new(ErrorKind::Conflict, format!("disk '{cid}' {why}"));
        let (lock, disk) = self.locked_idle_disk(cid, deadline)?;
        if let Some(holder) = self.holder(&disk, deadline)? {
            return Err(refused(format!("is attached to VM '{holder}'")).hint("detach it first"));
        }
        self.is_unused_image(&disk)?;
        if disk.inactive_image.is_some() {
            return Err(refused(
                "has an image that an earlier copy left, and that can not be removed".to_owned(),
            ));
        }
        if disk.encrypted && self.config.key_file.is_none() {
            return Err(refused("is encrypted with a key that only this host has".to_owned()).hint(
                "give all hosts one 'key_file', with this host's key in it; or make the disk `encrypted: false` first",
            ));
        }
        if !disk.pool.as_deref().is_some_and(|pool| self.store.pools().is_shared(pool)) {
            return Err(refused("is in no shared pool".to_owned()));
        }
        let metadata = self.store.lock(Rank::Metadata, cid, deadline)?;
        self.store.release(&disk)?;
        tracing::info!(%cid, "the disk is nobody's now");
        metadata.unlink()?;
        lock.unlink()
    }

    /// Makes a disk in a shared pool this host's although another host has it, which is gone for good.
    ///
    /// # Errors
    /// [`ErrorKind::DiskNotFound`] if no pool has it; [`ErrorKind::Corrupt`] if it can not be told what it is.
    pub fn take_disk(&self, cid: &DiskCid) -> Result<()> {
        let deadline = self.deadline("attach_disk");
        self.adopt(cid, deadline)?;
        if let Some(disk) = self.store.find::<DiskRecord>(cid)? {
            let ours = self.store.ensure_owned(&disk);
            if ours.is_ok() || !self.store.is_outdated(&disk)? {
                return ours;
            }
        }
        self.store.prepare()?;
        let lock = self.disk_lock(cid, deadline)?;
        let judge = |image: &Path| {
            image::released(image).map_err(|e| e.during(format!("take disk '{cid}'")))
        };
        let taken = self.store.take_from_lost_host(cid, judge);
        if taken.is_err() && !atomic::entry_exists(&self.store.disk_dir(cid)) {
            lock.unlink()?;
        }
        taken
    }
}
