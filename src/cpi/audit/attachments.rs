//! Which VM has which disk: what a call left open, and records that do not agree.

use super::hold::Hold;
use super::{Audit, Kind};
use crate::cid::{DiskCid, VmCid};
use crate::error::{Error, ErrorKind, Result};
use crate::store::record::AttachmentPhase::{self, Attached};
use crate::store::{DiskRecord, Phase, Rank, VmRecord};

impl Audit<'_> {
    pub(super) fn attachments(&mut self) -> Result<()> {
        for cid in self.cpi.store.list::<VmRecord>()? {
            let Ok(Some(vm)) = self.cpi.store.read::<VmRecord>(&cid) else { continue };
            for attachment in vm.disks.iter().filter(|_| vm.phase == Phase::Ready) {
                if attachment.phase == Attached {
                    self.agreed(&vm, &attachment.disk)?;
                } else {
                    self.open(&vm, &attachment.disk)?;
                }
            }
        }
        Ok(())
    }

    /// Whether the disk knows who has it. The VM's record decides, but whoever wants the disk asks the disk's first.
    fn agreed(&mut self, vm: &VmRecord, disk: &DiskCid) -> Result<()> {
        let Some(lock) = self.hold(Rank::Disk, disk) else { return Ok(()) };
        let (cpi, what) = (self.cpi, format!("{disk} on {}", vm.cid));
        let Some((lock, record)) = self.record(disk, lock, vm, &what)? else { return Ok(()) };
        if record.vm.as_ref() == Some(&vm.cid) || !self.still_has(&vm.cid, disk) {
            return Ok(());
        }
        let named =
            record.vm.as_ref().map_or_else(|| "nobody".to_owned(), |other| format!("VM '{other}'"));
        if record.vm.as_ref().is_some_and(|other| self.still_has(other, disk)) {
            let why = format!("{named} has it, too: whatever both write is lost");
            self.told(
                Kind::Unsettled,
                &what,
                &why,
                "delete the VM that must not have it; then check the filesystem",
            );
            return Ok(());
        }
        drop(lock);
        let why = format!("the disk's record says that {named} has it");
        self.found(Kind::Unsettled, &what, &why, || {
            let deadline = Self::deadline();
            let (_lock, mut record) = cpi.locked_disk(disk, deadline)?;
            let holder = cpi.holder(&record, deadline)?;
            let (_vm_lock, vm) = cpi.locked_vm(&vm.cid, deadline)?;
            if vm.attachment(disk).is_none() || holder.is_some() {
                return Err(Error::new(ErrorKind::Conflict, "a call changed it meanwhile"));
            }
            record.vm = Some(vm.cid);
            cpi.store.write(&record)
        });
        Ok(())
    }

    /// Whether the record of the VM, now, lists the disk as attached.
    fn still_has(&self, vm: &VmCid, disk: &DiskCid) -> bool {
        self.phase(vm, disk) == Some(Attached)
    }

    /// As what the record of the VM, now, lists the disk.
    fn phase(&self, vm: &VmCid, disk: &DiskCid) -> Option<AttachmentPhase> {
        self.cpi.store.read::<VmRecord>(vm).ok().flatten()?.attachment(disk).map(|a| a.phase)
    }

    /// The record of a disk that the VM lists, if it can be read.
    fn record(
        &mut self,
        disk: &DiskCid,
        lock: Hold,
        vm: &VmRecord,
        what: &str,
    ) -> Result<Option<(Hold, DiskRecord)>> {
        match self.cpi.store.read::<DiskRecord>(disk) {
            Ok(Some(record)) => Ok(Some((lock, record))),
            Ok(None) => {
                lock.unlink()?;
                let next = format!(
                    "restore the disk's record from a backup, or call detach_disk for VM '{}'",
                    vm.cid
                );
                self.told(Kind::Unsettled, &what, "the disk has no record", &next);
                Ok(None)
            }
            // It is a finding of its own.
            Err(_) => Ok(None),
        }
    }

    /// An attach or a detach that was cut short.
    fn open(&mut self, vm: &VmRecord, disk: &DiskCid) -> Result<()> {
        let Some(lock) = self.hold(Rank::Disk, disk) else { return Ok(()) };
        // The call may have ended since the record was read.
        if self.idle(Rank::Vm, &vm.cid).is_none()
            || self.phase(&vm.cid, disk).is_none_or(|phase| phase == Attached)
        {
            return Ok(());
        }
        let (cpi, what) = (self.cpi, format!("{disk} on {}", vm.cid));
        let Some((_lock, record)) = self.record(disk, lock, vm, &what)? else { return Ok(()) };
        let mut kept = false;
        self.found(Kind::Unsettled, &what, "an attach or a detach was cut short", || {
            kept = cpi.holder(&record, Self::deadline())?.is_some();
            Ok(())
        });
        if kept {
            // Asking QEMU settles it only if the guest has let go.
            self.findings.pop();
            let next = "repeat attach_disk or detach_disk, whichever was meant; until then the VM has the disk";
            self.told(
                Kind::Unsettled,
                &what,
                "the guest has the disk, and a call about it was cut short",
                next,
            );
        }
        Ok(())
    }
}
