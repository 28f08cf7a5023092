//! attach_disk, detach_disk, get_disks.
//!
//! ```text
//!                 disk.json names the VM          vm.json lists the disk as
//!   free                  –                               –
//!     │ attach           yes                          attaching      QEMU is asked, then told
//!     ▼                  yes                          attached       the hint is answered
//!     │ detach           yes                          detaching      the guest is asked to let go
//!     ▼                   –                               –
//! ```
//!
//! The VM's record decides who has a disk; the disk's only says where to look, and is written first and cleared last.
//! So a disk on a VM that is gone is free, and a call that was cut short leaves a phase that the next call on the disk
//! settles by asking QEMU.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::Cpi;
use crate::agent::settings::device_path;
use crate::cid::{Cid, DiskCid, VmCid};
use crate::error::{Error, ErrorKind, Result};
use crate::qemu::{FileNeed, blockdev, topology};
use crate::qmp::hotplug::{self, Attach, HotDisk, Inventory};
use crate::qmp::monitor::Monitor;
use crate::store::atomic::Staged;
use crate::store::record::AttachmentPhase::{self, Attached, Attaching, Detaching};
use crate::store::{DiskRecord, Phase, Rank, VmRecord};
use crate::supervisor::{PowerState, open_file};
use crate::sys::pidlock;

/// What is kept of a deadline for removing nodes and descriptors.
const CLEANING_UP: Duration = Duration::from_secs(3);

/// How long a QEMU that closed its monitor takes to be gone, at most: its memory and its taps go in between.
pub(super) const DYING: Duration = Duration::from_secs(2);

/// A guest that is going to finish an earlier detach does so now, or not before somebody looks after it.
const FINISH: Duration = Duration::from_secs(10);

impl Cpi {
    /// Attaches the disk and answers the path under which every current agent finds it: a stable one, because the
    /// agent uses it again after each reboot.
    pub(super) fn attach(&self, vm_cid: &VmCid, disk_cid: &DiskCid) -> Result<String> {
        let deadline = self.deadline("attach_disk");
        self.vm(vm_cid)?;
        let (_disk_lock, mut disk) = self.locked_disk(disk_cid, deadline)?;
        if let Some(holder) = self.holder(&disk, deadline)?.filter(|holder| holder != vm_cid) {
            return Err(Error::new(
                ErrorKind::Conflict,
                format!("disk '{disk_cid}' is attached to VM '{holder}'"),
            )
            .hint("detach it there first"));
        }
        let (_vm_lock, mut vm) = self.locked_vm(vm_cid, deadline)?;
        // Before anything is written down.
        self.power(vm_cid)?;
        let phase = vm.attachment(disk_cid).map(|attachment| attachment.phase);
        let slots = vm.machine.hotplug_slots as usize;
        let taken = vm.disks.iter().filter(|other| other.phase != Attaching).count();
        if phase.is_none() && taken >= slots {
            return Err(Error::new(
                ErrorKind::NotSupported,
                format!("VM '{vm_cid}' has {slots} disks and no slot left"),
            )
            .hint("recreate it with a larger cloud property 'extra_disks_slots'"));
        }
        if disk.vm.as_ref() != Some(vm_cid) {
            disk.vm = Some(vm_cid.clone());
            self.store.write(&disk)?;
        }
        let doing = || format!("attach disk '{disk_cid}' to VM '{vm_cid}'");
        match phase {
            // An answer was given on it: it stays attached whatever comes of asking again.
            Some(Attached) => {}
            // The guest was asked to let go and may still do so, with the disk mounted again. First that must end.
            Some(Detaching) => self
                .unplug(&vm, &hot_disk(&disk), deadline.min(Instant::now() + FINISH))
                .map_err(|e| e.during(format!("finish an earlier detach, to {}", doing())))?,
            Some(Attaching) | None => self.advance(&mut vm, disk_cid, Attaching)?,
        }
        let hint = device_path(disk_cid.as_str());
        if phase == Some(Attached) {
            return self.plug(&vm, &disk, deadline).map(|()| hint).map_err(|e| e.during(doing()));
        }
        vm.set_attachment(disk_cid, Attached);
        // Once the guest has the disk, no full filesystem may keep us from writing that down.
        let attached = self.store.stage(&vm).and_then(|record| {
            self.plug(&vm, &disk, deadline)?;
            record.commit()
        });
        attached.map(|()| hint).map_err(|error| {
            if let Err(left) = self.take_back(&mut vm, &disk) {
                // Whoever asks for the disk next settles it.
                tracing::warn!(disk = %disk_cid, error = left.report(), "a failed attach is not undone yet");
            }
            error.during(doing())
        })
    }

    /// Undoes an attach that failed. It may have used up its time and still has to find out where it stands.
    fn take_back(&self, vm: &mut VmRecord, disk: &DiskRecord) -> Result<()> {
        let deadline = Instant::now() + CLEANING_UP;
        if self.is_plugged(vm, &disk.cid, deadline)? {
            // Written down first, because the guest may let go of it after we have stopped waiting.
            self.advance(vm, &disk.cid, Detaching)?;
        }
        self.unplug(vm, &hot_disk(disk), deadline)?;
        self.stage_release(vm, &disk.cid, Some(disk))?.into_iter().try_for_each(Staged::commit)
    }

    pub(super) fn detach(&self, vm_cid: &VmCid, disk_cid: &DiskCid) -> Result<()> {
        let deadline = self.deadline("detach_disk");
        self.vm(vm_cid)?;
        let disk_lock = self.disk_lock(disk_cid, deadline)?;
        let mut disk = self.store.find::<DiskRecord>(disk_cid)?;
        let (_lock, _brief) = match &mut disk {
            Some(disk) => {
                // Of a disk that another host has now, or whose pool does not answer, only the VM's word for it is taken back.
                if disk.inactive_image.is_some() && self.store.ensure_owned(disk).is_ok() {
                    self.settle_copy(disk, deadline)?;
                }
                (Some(disk_lock), None)
            }
            // Of a disk that is not there nothing stays, whatever comes of this.
            None => (None, Some(disk_lock.into_short_lock())),
        };
        let hot = disk.as_ref().map_or_else(|| hot_image(disk_cid, disk_cid.as_str()), hot_disk);
        let (_vm_lock, mut vm) = self.locked_vm(vm_cid, deadline)?;
        self.power(vm_cid)?;
        // Once the guest has let go, no full filesystem may keep us from writing that down.
        let released = self.stage_release(&vm, disk_cid, disk.as_ref())?;
        if vm.attachment(disk_cid).is_some() {
            self.advance(&mut vm, disk_cid, Detaching)?;
        }
        // Asked even when the record lists nothing: a call may have been cut short before it wrote that down.
        if let Err(error) = self.unplug(&vm, &hot, deadline) {
            // It stays listed as detaching: the disk is the VM's, also after a restart, but the guest may let go of it at
            // any time.
            return Err(error.during(format!("detach disk '{disk_cid}' from VM '{vm_cid}'")));
        }
        released.into_iter().try_for_each(Staged::commit)
    }

    pub(super) fn attached_disks(&self, vm: &VmCid) -> Result<Vec<DiskCid>> {
        Ok(self
            .vm(vm)?
            .disks
            .into_iter()
            .filter(|a| a.phase != Attaching)
            .map(|a| a.disk)
            .collect())
    }

    /// The VM that has the disk. The caller holds the disk's lock. An attachment whose call was cut short is settled.
    pub(super) fn holder(&self, disk: &DiskRecord, deadline: Instant) -> Result<Option<VmCid>> {
        let Some(cid) = &disk.vm else { return Ok(None) };
        let listing = |vm: &VmRecord| vm.attachment(&disk.cid).map(|a| a.phase);
        let Some(vm) = self.store.find::<VmRecord>(cid)? else { return Ok(None) };
        match (vm.phase, listing(&vm)) {
            (_, None) => return Ok(None),
            (Phase::Creating | Phase::Ready, Some(Attached)) => return Ok(Some(cid.clone())),
            // A call is at work, or was cut short. The VM's lock tells.
            _ => {}
        }
        let lock = self.store.lock(Rank::Vm, cid, deadline)?;
        let Some(mut vm) = self.store.find::<VmRecord>(cid)? else {
            lock.unlink()?;
            return Ok(None);
        };
        let Some(phase) = listing(&vm) else { return Ok(None) };
        if vm.phase == Phase::Deleting {
            return self.let_go(cid).map(|()| None);
        }
        // An unfinished detach from a VM that is off: its next start plugs the disk in again.
        let off = matches!(self.power(cid)?, PowerState::Off);
        let keeps = phase == Attached || (off && phase == Detaching);
        if vm.phase == Phase::Ready && (keeps || self.is_plugged(&vm, &disk.cid, deadline)?) {
            return Ok(Some(cid.clone()));
        }
        // Without a device QEMU may still have the image open, and locked.
        self.unplug(&vm, &hot_disk(disk), deadline)?;
        vm.remove_attachment(&disk.cid);
        self.store.write(&vm)?;
        Ok(None)
    }

    /// Whether nothing can open the disks of a VM whose removal was cut short any more.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if its QEMU or its supervisor lives.
    fn let_go(&self, vm: &VmCid) -> Result<()> {
        let supervisor = self.store.vm(vm).supervisor_pid();
        if matches!(self.power(vm)?, PowerState::Off) && pidlock::holder(&supervisor)?.is_none() {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Conflict,
            format!("VM '{vm}' has the disk, and its removal was cut short"),
        )
        .hint("repeat delete_vm"))
    }

    fn advance(&self, vm: &mut VmRecord, disk: &DiskCid, phase: AttachmentPhase) -> Result<()> {
        if vm.attachment(disk).is_some_and(|a| a.phase == phase) {
            return Ok(());
        }
        vm.set_attachment(disk, phase);
        self.store.write(vm)
    }

    /// The records as they are when VM and disk have forgotten each other, the VM's first. One that says so already, or is
    /// not there, is left out.
    fn stage_release(
        &self,
        vm: &VmRecord,
        cid: &DiskCid,
        disk: Option<&DiskRecord>,
    ) -> Result<Vec<Staged>> {
        let mut staged = Vec::new();
        if vm.attachment(cid).is_some() {
            let mut vm = vm.clone();
            vm.remove_attachment(cid);
            staged.push(self.store.stage(&vm)?);
        }
        if let Some(disk) = disk.filter(|disk| disk.vm.as_ref() == Some(&vm.cid)) {
            staged.push(self.store.stage(&DiskRecord { vm: None, ..disk.clone() })?);
        }
        Ok(staged)
    }

    /// The VM's monitor, or `None` if the VM is off: then its next start plugs what the record lists.
    pub(super) fn monitor(&self, vm: &VmRecord, deadline: Instant) -> Result<Option<Monitor>> {
        match self.power(&vm.cid)? {
            PowerState::Off => Ok(None),
            PowerState::On(_) => {
                Ok(Some(Monitor::connect(&self.store.vm(&vm.cid).qmp(), deadline)?))
            }
        }
    }

    /// Plugs the disk into a VM that is on.
    fn plug(&self, vm: &VmRecord, disk: &DiskRecord, deadline: Instant) -> Result<()> {
        self.unless_off(vm, deadline, |monitor| self.plug_into(monitor, disk, deadline))
    }

    fn plug_into(&self, monitor: &mut Monitor, disk: &DiskRecord, deadline: Instant) -> Result<()> {
        let need = FileNeed::disk(&self.store, disk)?;
        let (opened, file) = open_file(&self.config, need)?;
        let id = disk.cid.as_str();
        let device = blockdev::device(&opened.need, id);
        let hot = hot_disk(disk);
        let wanted = Attach {
            disk: &hot,
            file: file.as_fd(),
            blockdevs: &|fdset| blockdev::nodes(&opened, fdset).to_vec(),
            device: device.as_object().expect("a device is an object"),
            port_prefix: topology::PORT_PREFIX,
        };
        if disk.encrypted && !Inventory::take(monitor)?.has_device(id) {
            self.with_key(monitor, &disk.cid, |monitor| {
                hotplug::attach(monitor, &wanted, deadline)
            })?;
        } else {
            hotplug::attach(monitor, &wanted, deadline)?;
        }
        if let Some(limits) = blockdev::throttle(id, disk.limits) {
            monitor.raw("block_set_io_throttle", &limits)?;
        }
        Ok(())
    }

    /// Unplugs the disk from a VM that is on, and removes whatever its QEMU has of it.
    fn unplug(&self, vm: &VmRecord, disk: &HotDisk, deadline: Instant) -> Result<()> {
        // After the guest has let go, there is still something to remove.
        let until = deadline
            .checked_sub(CLEANING_UP)
            .unwrap_or(deadline)
            .max(Instant::now() + CLEANING_UP / 3);
        self.unless_off(vm, deadline, |monitor| Ok(hotplug::detach(monitor, disk, until)?))
    }

    /// Does something with the QEMU of a VM that is on. One that is off, or that ended meanwhile, has nothing plugged in and
    /// nothing open: its next start goes by the record, and can not begin before we give up the VM's lock.
    fn unless_off(
        &self,
        vm: &VmRecord,
        deadline: Instant,
        act: impl FnOnce(&mut Monitor) -> Result<()>,
    ) -> Result<()> {
        let PowerState::On(qemu) = self.power(&vm.cid)? else { return Ok(()) };
        let qmp = self.store.vm(&vm.cid).qmp();
        let acted =
            Monitor::connect(&qmp, deadline).map_err(Error::from).and_then(|mut m| act(&mut m));
        match acted {
            // A QEMU that dies closes its monitor a moment before it is gone.
            Err(error)
                if error.kind() == ErrorKind::Host && qemu.wait_exit(Instant::now() + DYING)? =>
            {
                tracing::info!(error = error.report(), "QEMU ended meanwhile");
                Ok(())
            }
            acted => acted,
        }
    }

    /// Whether the VM's QEMU has a device of the disk's name, whatever the record says.
    fn is_plugged(&self, vm: &VmRecord, disk: &DiskCid, deadline: Instant) -> Result<bool> {
        match self.monitor(vm, deadline)? {
            Some(mut monitor) => Ok(Inventory::take(&mut monitor)?.has_device(disk.as_str())),
            None => Ok(false),
        }
    }
}

/// The names of a disk in QEMU, as `qemu::blockdev` gives them.
pub(super) fn hot_disk(disk: &DiskRecord) -> HotDisk {
    hot_image(&disk.cid, &disk.current().node(&disk.cid))
}

/// The same of one of its images.
pub(super) fn hot_image(disk: &DiskCid, node: &str) -> HotDisk {
    HotDisk {
        device: disk.as_str().to_owned(),
        node: node.to_owned(),
        below: vec![blockdev::file_node(node)],
    }
}

/// A call that has used up its time still has to find out where it stands.
pub(super) fn grace(deadline: Instant) -> Instant {
    deadline.max(Instant::now() + CLEANING_UP)
}
