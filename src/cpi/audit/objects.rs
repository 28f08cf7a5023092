//! Stemcells, disks and VMs as far as they are files and records.

use std::path::Path;

use super::{Audit, Finding, Kind};
use crate::cid::Cid;
use crate::cpi::leftovers;
use crate::cpi::leftovers::is_left;
use crate::error::{Error, ErrorKind, Result};
use crate::store::record::SnapshotRecord;
use crate::store::{DiskRecord, Phase, Rank, Record, StemcellRecord, VmRecord};

impl Audit<'_> {
    pub(super) fn objects(&mut self) -> Result<()> {
        self.each::<StemcellRecord>(Rank::Stemcell, Some(("create_stemcell", "delete_stemcell")))?;
        self.each::<SnapshotRecord>(Rank::Snapshot, Some(("snapshot_disk", "delete_snapshot")))?;
        self.each::<DiskRecord>(Rank::Disk, Some(("create_disk", "delete_disk")))?;
        // Of a VM more tells whether somebody knows it.
        self.each::<VmRecord>(Rank::Vm, None)?;
        self.copies()?;
        self.notes()
    }

    /// Copies of disks that were cut short: the next call on the disk would settle them.
    fn copies(&mut self) -> Result<()> {
        for cid in self.cpi.store.list::<DiskRecord>()? {
            let Some(lock) = self.idle(Rank::Disk, &cid) else { continue };
            let disk = self.cpi.store.read::<DiskRecord>(&cid).ok().flatten();
            drop(lock);
            let cpi = self.cpi;
            let Some(disk) =
                disk.filter(|disk| disk.phase == Phase::Ready && disk.inactive_image.is_some())
            else {
                continue;
            };
            if cpi.store.is_no_longer_owned(&disk) {
                // It is told of as what it is now.
                continue;
            }
            self.found(Kind::Unfinished, &cid, "a copy of it was cut short", || {
                match cpi.locked_disk(&cid, Self::deadline())?.1.inactive_image {
                    None => Ok(()),
                    Some(left) => {
                        let path = cpi.store.disk_image_at(&cid, &left)?;
                        Err(Error::new(
                            ErrorKind::Host,
                            format!("'{}' can not be removed yet", path.display()),
                        ))
                    }
                }
            });
        }
        Ok(())
    }

    /// `untold` names the calls that make and remove what is told by a note alone.
    fn each<R: Record>(&mut self, rank: Rank, untold: Option<(&str, &str)>) -> Result<()> {
        for cid in self.cpi.store.list::<R>()? {
            let Some(lock) = self.idle(rank, &cid) else { continue };
            match self.cpi.store.read::<R>(&cid) {
                Ok(Some(record)) if record.phase() == Phase::Ready => {
                    if let Some((create, delete)) = untold.filter(|_| self.is_untold::<R>(&cid)) {
                        self.untold(create, delete, &cid);
                    }
                }
                Ok(Some(record)) => {
                    drop(lock);
                    let why = if record.phase() == Phase::Creating {
                        "its creation"
                    } else {
                        "its removal"
                    };
                    let cpi = self.cpi;
                    self.found(Kind::Unfinished, &cid, &format!("{why} was cut short"), || {
                        cpi.clear_leftover(cid.as_str(), Self::deadline())
                    });
                }
                Ok(None) => {
                    drop(lock);
                    self.without_record(&cid, &self.cpi.store.record_dir::<R>(&cid));
                }
                Err(error) => {
                    let next = "restore it from a backup; or move its directory away, and all it stands for is gone";
                    self.told(Kind::Corrupt, &cid, &error.chain(), next);
                }
            }
        }
        Ok(())
    }

    /// Whether nobody was told of the object. What can not be looked at is a finding.
    pub(super) fn is_untold<R: Record>(&mut self, cid: &R::Cid) -> bool {
        self.cpi.is_untold::<R>(cid).unwrap_or_else(|error| {
            self.unknown(cid, &error);
            false
        })
    }

    pub(super) fn untold(&mut self, create: &str, delete: &str, cid: &impl Cid) {
        let why = format!(
            "its {create} was killed before anybody was told of it, or the power was cut soon after"
        );
        self.told(Kind::Untold, cid, &why, &format!("call {delete}, unless a Director knows it"));
    }

    pub(super) fn without_record(&mut self, cid: &impl Cid, dir: &Path) {
        let (cpi, empty) =
            (self.cpi, dir.read_dir().map_or(true, |mut entries| entries.next().is_none()));
        if cpi.has_note(cid) {
            self.found(Kind::Unfinished, cid, "its creation was cut short", || {
                cpi.clear_leftover(cid.as_str(), Self::deadline())
            });
        } else if empty {
            // The last step but one of a removal.
            self.found(Kind::Unfinished, cid, "its removal was cut short", || {
                cpi.clear_leftover(cid.as_str(), Self::deadline())
            });
        } else {
            let next = format!(
                "restore the record in '{}' from a backup, or remove the directory",
                dir.display()
            );
            self.told(Kind::NoRecord, cid, "it has files but no record", &next);
        }
    }

    /// Creates that were cut short before there was a record, or after it was whole. What else is noted, a copy of a disk,
    /// was found before.
    fn notes(&mut self) -> Result<()> {
        for name in self.cpi.notes() {
            let Some((rank, lock)) = leftovers::lock_of(&name) else { continue };
            let Some(hold) = self.hold(rank, &lock) else { continue };
            // Its create may have ended since it was listed, or be about to take the lock.
            let is_over = self.cpi.is_noted(&name)
                && !self.cpi.may_begin(&name)
                && (hold.had_file()
                    || is_left(
                        &self.cpi.store.pending_dir().join(&name),
                        self.cpi.noted_by(&name),
                    ));
            if self.cpi.store.lock_has_object(rank, &lock) {
                drop(hold);
            } else {
                hold.unlink()?;
            }
            let is_found = |finding: &Finding| finding.what == name && finding.kind != Kind::Untold;
            if is_over && !self.findings.iter().any(is_found) {
                let cpi = self.cpi;
                self.found(Kind::Unfinished, &name, "its creation was cut short", || {
                    cpi.clear_leftover(&name, Self::deadline())
                });
            }
        }
        Ok(())
    }
}
