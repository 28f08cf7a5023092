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

use std::time::Instant;

use super::Cpi;
use crate::agent::settings::device_path;
use crate::cid::{Cid, DiskCid, VmCid};
use crate::error::{Error, ErrorKind, Result};
use crate::image;
use crate::qemu::{FileNeed, Opened, blockdev, topology};
use crate::qmp::hotplug::{self, Disk};
use crate::qmp::monitor::Monitor;
use crate::store::record::AttachmentPhase::{Attached, Attaching, Detaching};
use crate::store::{DiskRecord, Phase, Rank, VmRecord};
use crate::supervisor::{PowerState, power_state};

impl Cpi {
    /// Attaches the disk and answers the path under which every current agent finds it: a stable one, because the
    /// agent uses it again after each reboot.
    pub(super) fn attach(&self, vm_cid: &VmCid, disk_cid: &DiskCid) -> Result<String> {
        let deadline = self.deadline("attach_disk");
        self.vm(vm_cid)?;
        self.disk(disk_cid)?;
        let _disk_lock = self.store.lock(Rank::Disk, disk_cid, deadline)?;
        let mut disk = self.disk(disk_cid)?;
        if let Some(holder) = self.holder(&disk, deadline)?.filter(|holder| holder != vm_cid) {
            return Err(Error::new(ErrorKind::Conflict, format!("disk '{disk_cid}' is attached to VM '{holder}'"))
                .hint("detach it there first"));
        }
        let _vm_lock = self.store.lock(Rank::Vm, vm_cid, deadline)?;
        let mut vm = self.vm(vm_cid)?;
        let listed = vm.attachment(disk_cid).is_some();
        let slots = vm.machine.hotplug_slots as usize;
        if !listed && vm.disks.len() >= slots {
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
        self.advance(&mut vm, disk_cid, Attaching)?;
        if let Err(error) = self.plug(&vm, &disk, deadline) {
            if !self.is_plugged(&vm, disk_cid, deadline).unwrap_or(true) {
                self.clear(&mut vm, &mut disk)?;
            }
            return Err(error.during(format!("attach disk '{disk_cid}' to VM '{vm_cid}'")));
        }
        self.advance(&mut vm, disk_cid, Attached)?;
        Ok(device_path(disk_cid.as_str()))
    }

    pub(super) fn detach(&self, vm_cid: &VmCid, disk_cid: &DiskCid) -> Result<()> {
        let deadline = self.deadline("detach_disk");
        self.vm(vm_cid)?;
        let disk_lock = self.store.lock(Rank::Disk, disk_cid, deadline)?;
        let _vm_lock = self.store.lock(Rank::Vm, vm_cid, deadline)?;
        let mut vm = self.vm(vm_cid)?;
        let disk = self.store.read::<DiskRecord>(disk_cid)?;
        let listed = vm.attachment(disk_cid).is_some();
        if listed {
            self.advance(&mut vm, disk_cid, Detaching)?;
        }
        // Asked even when the record lists nothing: a call may have been cut short before it wrote that down.
        if let Err(error) = self.unplug(&vm, disk_cid, deadline) {
            if listed {
                self.advance(&mut vm, disk_cid, Attached)?;
            }
            return Err(error.during(format!("detach disk '{disk_cid}' from VM '{vm_cid}'")));
        }
        match disk {
            Some(mut disk) => self.clear(&mut vm, &mut disk),
            None => {
                vm.forget_attachment(disk_cid);
                self.store.write(&vm)?;
                disk_lock.retire()
            }
        }
    }

    pub(super) fn attached_disks(&self, vm: &VmCid) -> Result<Vec<DiskCid>> {
        Ok(self.vm(vm)?.disks.into_iter().filter(|a| a.phase == Attached).map(|a| a.disk).collect())
    }

    /// The VM that has the disk. The caller holds the disk's lock. An attachment whose call was cut short is settled.
    pub(super) fn holder(&self, disk: &DiskRecord, deadline: Instant) -> Result<Option<VmCid>> {
        let Some(cid) = &disk.vm else { return Ok(None) };
        let listing = |vm: &VmRecord| vm.attachment(&disk.cid).map(|a| a.phase);
        match self.store.read::<VmRecord>(cid)?.as_ref().and_then(listing) {
            None => Ok(None),
            Some(Attached) => Ok(Some(cid.clone())),
            Some(Attaching | Detaching) => {
                let _lock = self.store.lock(Rank::Vm, cid, deadline)?;
                let Some(mut vm) = self.store.read::<VmRecord>(cid)? else { return Ok(None) };
                if listing(&vm).is_none() {
                    return Ok(None);
                }
                if vm.phase == Phase::Ready && self.is_plugged(&vm, &disk.cid, deadline)? {
                    self.advance(&mut vm, &disk.cid, Attached)?;
                    return Ok(Some(cid.clone()));
                }
                vm.forget_attachment(&disk.cid);
                self.store.write(&vm)?;
                Ok(None)
            }
        }
    }

    fn advance(&self, vm: &mut VmRecord, disk: &DiskCid, phase: crate::store::record::AttachmentPhase) -> Result<()> {
        if vm.attachment(disk).is_some_and(|a| a.phase == phase) {
            return Ok(());
        }
        vm.set_attachment(disk, phase);
        self.store.write(vm)
    }

    /// Both records forget each other, the VM's first.
    fn clear(&self, vm: &mut VmRecord, disk: &mut DiskRecord) -> Result<()> {
        if vm.attachment(&disk.cid).is_some() {
            vm.forget_attachment(&disk.cid);
            self.store.write(vm)?;
        }
        if disk.vm.as_ref() == Some(&vm.cid) {
            disk.vm = None;
            self.store.write(disk)?;
        }
        Ok(())
    }

    /// The VM's monitor, or `None` if the VM is off: then its next start plugs what the record lists.
    fn monitor(&self, vm: &VmRecord, deadline: Instant) -> Result<Option<Monitor>> {
        let paths = self.store.vm(&vm.cid);
        match power_state(&paths)? {
            PowerState::Off => Ok(None),
            PowerState::On(_) => Ok(Some(Monitor::connect(&paths.qmp(), deadline)?)),
        }
    }

    fn plug(&self, vm: &VmRecord, disk: &DiskRecord, deadline: Instant) -> Result<()> {
        let Some(mut monitor) = self.monitor(vm, deadline)? else { return Ok(()) };
        let need = FileNeed::disk(&self.store, disk);
        let (file, direct) = image::open(&need.path, need.writable, need.direct)?;
        let opened = Opened { need, direct };
        let id = disk.cid.as_str();
        let ports = (0..vm.machine.hotplug_slots).map(topology::port_id).collect();
        hotplug::attach(
            &mut monitor,
            &Disk {
                id,
                file,
                opaque: blockdev::opaque(id, true),
                nodes: &|fdset| blockdev::nodes(&opened, fdset).to_vec(),
                device: blockdev::device(id, id, true),
                ports,
            },
        )
    }

    fn unplug(&self, vm: &VmRecord, disk: &DiskCid, deadline: Instant) -> Result<()> {
        let Some(mut monitor) = self.monitor(vm, deadline)? else { return Ok(()) };
        let id = disk.as_str();
        let nodes = [blockdev::file_node(id), id.to_owned()];
        hotplug::detach(&mut monitor, id, &nodes, &blockdev::opaque(id, true), deadline)
    }

    fn is_plugged(&self, vm: &VmRecord, disk: &DiskCid, deadline: Instant) -> Result<bool> {
        match self.monitor(vm, deadline)? {
            Some(mut monitor) => hotplug::is_attached(&mut monitor, disk.as_str()),
            None => Ok(false),
        }
    }
}
