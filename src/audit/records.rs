//! Records, interrupted creates and deletes, files without a record.

use std::path::Path;

use super::{Audit, Finding, Kind};
use crate::cid::Cid;
use crate::cpi::creation::{acknowledgement, pending};
use crate::cpi::{disk, recovery};
use crate::error::{Error, ErrorKind, Result};
use crate::store::record::SnapshotRecord;
use crate::store::{DiskRecord, Phase, Rank, Record, StemcellRecord, VmRecord};

impl Audit<'_> {
    pub(super) fn records(&mut self) -> Result<()> {
        self.each::<StemcellRecord>(Rank::Stemcell, Some(("create_stemcell", "delete_stemcell")))?;
        self.each::<SnapshotRecord>(Rank::Snapshot, Some(("snapshot_disk", "delete_snapshot")))?;
        self.each::<DiskRecord>(Rank::Disk, Some(("create_disk", "delete_disk")))?;
        // Whether a VM is acknowledged depends on more than its marker: see `vms`.
        self.each::<VmRecord>(Rank::Vm, None)?;
        self.copies()?;
        self.pending_notes()
    }

    /// Interrupted copies of disks. The next call on the disk would settle them.
    fn copies(&mut self) -> Result<()> {
        for cid in self.cx.store.list::<DiskRecord>()? {
            let Some(lock) = self.lock_object(Rank::Disk, &cid) else { continue };
            let disk = self.cx.store.read::<DiskRecord>(&cid).ok().flatten();
            drop(lock);
            let cx = self.cx;
            let Some(disk) =
                disk.filter(|disk| disk.phase == Phase::Ready && disk.inactive_image.is_some())
            else {
                continue;
            };
            if cx.store.is_no_longer_owned(&disk) {
                // Another host owns it: `images` reports that.
                continue;
            }
            self.found(Kind::Unfinished, &cid, "a copy of it was interrupted", || {
                match disk::lock_settled(cx, &cid, Self::deadline())?.1.inactive_image {
                    None => Ok(()),
                    Some(left) => {
                        let path = cx.store.disk_image_at(&cid, &left)?;
                        Err(Error::new(
                            ErrorKind::Host,
                            format!("'{}' cannot be removed yet", path.display()),
                        ))
                    }
                }
            });
        }
        Ok(())
    }

    /// `calls` names the calls that create and delete objects whose marker alone shows that they
    /// are unacknowledged.
    fn each<R: Record>(&mut self, rank: Rank, calls: Option<(&str, &str)>) -> Result<()> {
        for cid in self.cx.store.list::<R>()? {
            let Some(lock) = self.lock_object(rank, &cid) else { continue };
            match self.cx.store.read::<R>(&cid) {
                Ok(Some(record)) if record.phase() == Phase::Ready => {
                    if let Some((create, delete)) =
                        calls.filter(|_| self.is_unacknowledged::<R>(&cid))
                    {
                        self.unacknowledged(create, delete, &cid);
                    }
                }
                Ok(Some(record)) => {
                    drop(lock);
                    let is_creating = record.phase() == Phase::Creating;
                    let step = if is_creating { "creation" } else { "deletion" };
                    let cx = self.cx;
                    self.found(
                        Kind::Unfinished,
                        &cid,
                        &format!("its {step} was interrupted"),
                        || recovery::recover(cx, cid.as_str(), Self::deadline()),
                    );
                }
                Ok(None) => {
                    drop(lock);
                    self.without_record(&cid, &self.cx.store.record_dir::<R>(&cid));
                }
                Err(error) => {
                    let next = "restore it from a backup; or move its directory away, which loses \
                                the object";
                    self.for_operator(Kind::Corrupt, &cid, &error.chain(), next);
                }
            }
        }
        Ok(())
    }

    /// Whether the object's create has ended without an acknowledgement. A marker that cannot be
    /// inspected is a finding.
    pub(super) fn is_unacknowledged<R: Record>(&mut self, cid: &R::Cid) -> bool {
        acknowledgement::is_unacknowledged::<R>(self.cx, cid).unwrap_or_else(|error| {
            self.unknown(cid, &error);
            false
        })
    }

    pub(super) fn unacknowledged(&mut self, create: &str, delete: &str, cid: &impl Cid) {
        let why = format!(
            "its {create} was killed before the caller had the cid, or the power was cut soon after"
        );
        self.for_operator(
            Kind::Unacknowledged,
            cid,
            &why,
            &format!("call {delete}, unless a Director has the cid"),
        );
    }

    pub(super) fn without_record(&mut self, cid: &impl Cid, dir: &Path) {
        let (cx, empty) =
            (self.cx, dir.read_dir().map_or(true, |mut entries| entries.next().is_none()));
        if pending::contains(cx, cid) {
            self.found(Kind::Unfinished, cid, "its creation was interrupted", || {
                recovery::recover(cx, cid.as_str(), Self::deadline())
            });
        } else if empty {
            // The last step but one of a delete.
            self.found(Kind::Unfinished, cid, "its deletion was interrupted", || {
                recovery::recover(cx, cid.as_str(), Self::deadline())
            });
        } else {
            let next = format!(
                "restore the record in '{}' from a backup, or remove the directory",
                dir.display()
            );
            self.for_operator(Kind::NoRecord, cid, "it has files but no record", &next);
        }
    }

    /// Creates that were interrupted before they wrote the record, or after the object was ready.
    /// The other notes are those of copies, which were found before.
    fn pending_notes(&mut self) -> Result<()> {
        for name in pending::names(self.cx) {
            let Some((rank, lock_name)) = pending::lock_of(&name) else { continue };
            let Some(held) = self.lock(rank, &lock_name) else { continue };
            // The create may have ended meanwhile, or be about to take the lock.
            let is_over = pending::contains_name(self.cx, &name)
                && !pending::is_starting(self.cx, &name)
                && (held.had_file()
                    || pending::is_abandoned(
                        &self.cx.store.pending_dir().join(&name),
                        pending::creator(self.cx, &name),
                    ));
            if self.cx.store.lock_has_object(rank, &lock_name) {
                drop(held);
            } else {
                held.unlink()?;
            }
            let is_found =
                |finding: &Finding| finding.what == name && finding.kind != Kind::Unacknowledged;
            if is_over && !self.findings.iter().any(is_found) {
                let cx = self.cx;
                self.found(Kind::Unfinished, &name, "its creation was interrupted", || {
                    recovery::recover(cx, &name, Self::deadline())
                });
            }
        }
        Ok(())
    }
}
