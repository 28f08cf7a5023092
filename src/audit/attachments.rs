//! Which VM has which disk: interrupted calls, and records that contradict each other.

use super::locks::ObjectLock;
use super::{Audit, Kind};
use crate::cid::{DiskCid, VmCid};
use crate::cpi::{disk, machine};
use crate::error::{Error, ErrorKind, Result};
use crate::store::record::AttachmentPhase::{self, Attached};
use crate::store::{DiskRecord, Phase, Rank, VmRecord};

impl Audit<'_> {
    pub(super) fn attachments(&mut self) -> Result<()> {
        for cid in self.cx.store.list::<VmRecord>()? {
            let Ok(Some(vm)) = self.cx.store.read::<VmRecord>(&cid) else { continue };
            for attachment in vm.disks.iter().filter(|_| vm.phase == Phase::Ready) {
                if attachment.phase == Attached {
                    self.attached(&vm, &attachment.disk)?;
                } else {
                    self.interrupted(&vm, &attachment.disk)?;
                }
            }
        }
        Ok(())
    }

    /// Checks that the disk's record names the VM. The VM's record decides, but calls on the disk
    /// read the disk's record first.
    fn attached(&mut self, vm: &VmRecord, disk: &DiskCid) -> Result<()> {
        let Some(lock) = self.lock(Rank::Disk, disk) else { return Ok(()) };
        let (cx, what) = (self.cx, format!("{disk} on {}", vm.cid));
        let Some((lock, record)) = self.record(disk, lock, vm, &what)? else { return Ok(()) };
        if record.vm.as_ref() == Some(&vm.cid) || !self.is_attached(&vm.cid, disk) {
            return Ok(());
        }
        let named =
            record.vm.as_ref().map_or_else(|| "no VM".to_owned(), |other| format!("VM '{other}'"));
        if record.vm.as_ref().is_some_and(|other| self.is_attached(other, disk)) {
            let why = format!("{named} has it, too: both may write to it");
            self.for_operator(
                Kind::Unsettled,
                &what,
                &why,
                "delete the VM that must not have it, then check the filesystem on the disk",
            );
            return Ok(());
        }
        drop(lock);
        let why = format!("the disk's record names {named}");
        self.found(Kind::Unsettled, &what, &why, || {
            let deadline = Self::deadline();
            let (_lock, mut record) = disk::lock_settled(cx, disk, deadline)?;
            let holder = disk::settle_attachment(cx, &record, deadline)?;
            let (_vm_lock, vm) = machine::lock(cx, &vm.cid, deadline)?;
            if vm.attachment(disk).is_none() || holder.is_some() {
                return Err(Error::new(ErrorKind::Conflict, "a call changed it meanwhile"));
            }
            record.vm = Some(vm.cid);
            cx.store.write(&record)
        });
        Ok(())
    }

    /// Whether the VM's current record lists the disk as attached.
    fn is_attached(&self, vm: &VmCid, disk: &DiskCid) -> bool {
        self.phase(vm, disk) == Some(Attached)
    }

    /// The phase in which the VM's current record lists the disk.
    fn phase(&self, vm: &VmCid, disk: &DiskCid) -> Option<AttachmentPhase> {
        self.cx.store.read::<VmRecord>(vm).ok().flatten()?.attachment(disk).map(|a| a.phase)
    }

    /// The record of a disk that the VM lists, if it can be read.
    fn record(
        &mut self,
        disk: &DiskCid,
        lock: ObjectLock,
        vm: &VmRecord,
        what: &str,
    ) -> Result<Option<(ObjectLock, DiskRecord)>> {
        match self.cx.store.read::<DiskRecord>(disk) {
            Ok(Some(record)) => Ok(Some((lock, record))),
            Ok(None) => {
                lock.unlink()?;
                let next = format!(
                    "restore the disk's record from a backup, or call detach_disk for VM '{}'",
                    vm.cid
                );
                self.for_operator(Kind::Unsettled, &what, "the disk has no record", &next);
                Ok(None)
            }
            // `records` reports it.
            Err(_) => lock.release().map(|()| None),
        }
    }

    /// An interrupted attach or detach.
    fn interrupted(&mut self, vm: &VmRecord, disk: &DiskCid) -> Result<()> {
        let Some(lock) = self.lock(Rank::Disk, disk) else { return Ok(()) };
        // The call may have ended meanwhile.
        if self.lock_object(Rank::Vm, &vm.cid).is_none()
            || self.phase(&vm.cid, disk).is_none_or(|phase| phase == Attached)
        {
            return lock.release();
        }
        let (cx, what) = (self.cx, format!("{disk} on {}", vm.cid));
        let Some((_lock, record)) = self.record(disk, lock, vm, &what)? else { return Ok(()) };
        let mut kept = false;
        self.found(Kind::Unsettled, &what, "an attach or a detach was interrupted", || {
            kept = disk::settle_attachment(cx, &record, Self::deadline())?.is_some();
            Ok(())
        });
        if kept {
            // QEMU was asked: the guest still has the disk.
            self.findings.pop();
            let next = "repeat attach_disk or detach_disk; until then the VM has the disk";
            self.for_operator(
                Kind::Unsettled,
                &what,
                "the guest has the disk, and a call on it was interrupted",
                next,
            );
        }
        Ok(())
    }
}
