//! The lock of a disk, which whoever copies it has for hours: in what way a call waits for it, and what it says then.

use std::time::Instant;

use super::Cpi;
use crate::cid::{DiskCid, SnapshotCid};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{DiskRecord, Guard, Rank, SnapshotRecord};

impl Cpi {
    /// Takes the lock of a disk, whether or not it is there.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] naming the snapshot or the update that has it, if one does.
    pub(super) fn disk_lock(&self, cid: &DiskCid, deadline: Instant) -> Result<Guard> {
        self.store.lock(Rank::Disk, cid, deadline).map_err(|error| {
            let copy = (error.kind() == ErrorKind::Timeout)
                .then(|| self.copy_at_work(cid).ok().flatten())
                .flatten();
            match copy {
                Some(copy) => {
                    error.during(being_copied(cid, &copy)).hint("repeat the call when that is done")
                }
                None => error,
            }
        })
    }

    /// Takes the lock of a disk that exists. A copy of it that was cut short is undone or finished.
    pub(super) fn locked_disk(
        &self,
        cid: &DiskCid,
        deadline: Instant,
    ) -> Result<(Guard, DiskRecord)> {
        loop {
            self.own_disk(cid, deadline)?;
            let lock = self.disk_lock(cid, deadline)?;
            match self.disk(cid) {
                Ok(mut disk) => {
                    self.is_told::<DiskRecord>(cid);
                    self.store.cancel_move(&disk)?;
                    self.settle_copy(&mut disk, deadline)?;
                    return Ok((lock, disk));
                }
                Err(error) => {
                    lock.unlink()?;
                    self.store.ensure_not_owned_elsewhere(cid)?;
                    // It was given up while its lock was waited for, and can be had again.
                    if !self.store.can_take(cid)? {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// The same, unless a copy of the disk is being made: that may take hours.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] naming the snapshot or the update.
    pub(super) fn locked_idle_disk(
        &self,
        cid: &DiskCid,
        deadline: Instant,
    ) -> Result<(Guard, DiskRecord)> {
        self.own_disk(cid, deadline)?;
        if let Some(copy) = self.copy_at_work(cid)? {
            let error = Error::new(ErrorKind::Conflict, being_copied(cid, &copy));
            return Err(error.hint("repeat the call when that is done"));
        }
        for snapshot in self.half_snapshots(cid)? {
            // Its call was killed.
            self.clear_snapshot(&snapshot, deadline).map_err(|e| {
                e.during(format!("remove what is left of snapshot '{snapshot}' of disk '{cid}'"))
            })?;
        }
        self.locked_disk(cid, deadline)
    }

    /// What copies the disk at the moment, in words.
    fn copy_at_work(&self, cid: &DiskCid) -> Result<Option<String>> {
        for snapshot in self.half_snapshots(cid)? {
            if self.store.try_lock(Rank::Snapshot, &snapshot)?.is_none() {
                return Ok(Some(format!("into snapshot '{snapshot}'")));
            }
        }
        let is_updated = self.disk(cid)?.inactive_image.is_some()
            && self.store.try_lock(Rank::Disk, cid)?.is_none();
        Ok(is_updated.then(|| "by update_disk".to_owned()))
    }

    /// The snapshots of the disk that are not whole, whether or not a call works on them.
    fn half_snapshots(&self, disk: &DiskCid) -> Result<Vec<SnapshotCid>> {
        let mut half = self.in_the_making::<SnapshotRecord>()?;
        // One that can not be read must not keep other disks from anything; QEMU does not resize what it copies.
        half.retain(|snapshot| {
            let made = self.store.read::<SnapshotRecord>(snapshot).ok().flatten();
            made.is_some_and(|made| made.disk.cid == *disk)
        });
        Ok(half)
    }
}

fn being_copied(disk: &DiskCid, copy: &str) -> String {
    format!("disk '{disk}' is being copied, {copy}")
}
