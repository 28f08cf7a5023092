//! The attachment of a disk to a VM: its states, and the hot-plug in QEMU.
//!
//! ```text
//!                 disk.json names the VM          vm.json lists the disk as
//!   free                  –                               –
//!     │ attach           yes                          attaching      QEMU gets the disk
//!     ▼                  yes                          attached       the hint is answered
//!     │ detach           yes                          detaching      the guest releases it
//!     ▼                   –                               –
//! ```
//!
//! The VM's record decides which VM has a disk; the disk's record only names the VM to look at. It
//! is written first and cleared last. So a disk on a VM that is deleted is free, and an interrupted
//! call leaves a phase that the next call on the disk settles by asking QEMU.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::encryption;
use crate::cid::{Cid, DiskCid, VmCid};
use crate::cpi::context::Context;
use crate::cpi::machine;
use crate::error::{Error, ErrorKind, Result};
use crate::qemu::{FileSpec, blockdev, topology};
use crate::qmp::hotplug::{self, AttachRequest, HotDisk, Inventory};
use crate::qmp::monitor::Monitor;
use crate::store::atomic::Staged;
use crate::store::record::AttachmentPhase::{self, Attached, Attaching, Detaching};
use crate::store::{DiskRecord, Phase, Rank, VmRecord};
use crate::supervisor::{PowerState, open_file};
use crate::sys::pidlock;

/// The part of a deadline that is reserved for removing nodes and descriptors from QEMU.
pub(super) const CLEAN_UP_TIMEOUT: Duration = Duration::from_secs(3);

/// get_disks: the persistent disks attached to the VM.
pub(in crate::cpi) fn attached_to(cx: &Context, vm: &VmCid) -> Result<Vec<DiskCid>> {
    let attachments = machine::find(cx, vm)?.disks.into_iter();
    Ok(attachments.filter(|a| a.phase != Attaching).map(|a| a.disk).collect())
}

/// Settles an interrupted attach or detach of the disk, whose lock the caller holds. Returns the VM
/// that the disk is attached to.
pub(crate) fn settle(cx: &Context, disk: &DiskRecord, deadline: Instant) -> Result<Option<VmCid>> {
    let Some(cid) = &disk.vm else { return Ok(None) };
    let listed = |vm: &VmRecord| vm.attachment(&disk.cid).map(|a| a.phase);
    let Some(vm) = cx.store.find::<VmRecord>(cid)? else { return Ok(None) };
    match (vm.phase, listed(&vm)) {
        (_, None) => return Ok(None),
        (Phase::Creating | Phase::Ready, Some(Attached)) => return Ok(Some(cid.clone())),
        // A call works on it, or was interrupted: the VM's lock shows which.
        _ => {}
    }
    let lock = cx.store.lock(Rank::Vm, cid, deadline)?;
    let Some(mut vm) = cx.store.find::<VmRecord>(cid)? else {
        lock.unlink()?;
        return Ok(None);
    };
    let Some(phase) = listed(&vm) else { return Ok(None) };
    if vm.phase == Phase::Deleting {
        return ensure_released(cx, cid).map(|()| None);
    }
    // The next start of a VM that is off plugs a disk in again whose detach was interrupted.
    let is_off = matches!(machine::power(cx, cid)?, PowerState::Off);
    let keeps = phase == Attached || (is_off && phase == Detaching);
    if vm.phase == Phase::Ready && (keeps || machine::has_device(cx, &vm, &disk.cid, deadline)?) {
        return Ok(Some(cid.clone()));
    }
    // QEMU may have the image open, and locked, without a device.
    unplug(cx, &vm, &hot_disk(disk), deadline)?;
    vm.remove_attachment(&disk.cid);
    cx.store.write(&vm)?;
    Ok(None)
}

/// Ensures that no process can open the disks of a VM whose delete_vm was interrupted.
///
/// # Errors
/// [`ErrorKind::Conflict`] if its QEMU or its supervisor runs.
fn ensure_released(cx: &Context, vm: &VmCid) -> Result<()> {
    let supervisor = cx.store.vm(vm).supervisor_pid();
    let is_off = matches!(machine::power(cx, vm)?, PowerState::Off);
    if is_off && pidlock::holder(&supervisor)?.is_none() {
        return Ok(());
    }
    let message = format!("the disk is attached to VM '{vm}', whose delete_vm was interrupted");
    Err(Error::new(ErrorKind::Conflict, message).hint("repeat delete_vm"))
}

/// Writes the phase of an attachment into the VM's record.
pub(super) fn set_phase(
    cx: &Context,
    vm: &mut VmRecord,
    disk: &DiskCid,
    phase: AttachmentPhase,
) -> Result<()> {
    if vm.attachment(disk).is_some_and(|a| a.phase == phase) {
        return Ok(());
    }
    vm.set_attachment(disk, phase);
    cx.store.write(vm)
}

/// Stages the records without the attachment, the VM's first. A record that does not have it, or
/// does not exist, is left out.
pub(super) fn stage_release(
    cx: &Context,
    vm: &VmRecord,
    cid: &DiskCid,
    disk: Option<&DiskRecord>,
) -> Result<Vec<Staged>> {
    let mut staged = Vec::new();
    if vm.attachment(cid).is_some() {
        let mut vm = vm.clone();
        vm.remove_attachment(cid);
        staged.push(cx.store.stage(&vm)?);
    }
    if let Some(disk) = disk.filter(|disk| disk.vm.as_ref() == Some(&vm.cid)) {
        staged.push(cx.store.stage(&DiskRecord { vm: None, ..disk.clone() })?);
    }
    Ok(staged)
}

/// Plugs the disk into the VM, if that is on.
pub(super) fn plug(
    cx: &Context,
    vm: &VmRecord,
    disk: &DiskRecord,
    deadline: Instant,
) -> Result<()> {
    machine::with_monitor(cx, vm, deadline, |monitor| plug_into(cx, monitor, disk, deadline))
}

fn plug_into(
    cx: &Context,
    monitor: &mut Monitor,
    disk: &DiskRecord,
    deadline: Instant,
) -> Result<()> {
    let (opened, file) = open_file(&cx.config, FileSpec::disk(&cx.store, disk)?)?;
    let id = disk.cid.as_str();
    let device = blockdev::device(&opened.spec, id);
    let hot = hot_disk(disk);
    let wanted = AttachRequest {
        disk: &hot,
        file: file.as_fd(),
        blockdevs: &|fdset| blockdev::nodes(&opened, fdset).to_vec(),
        device: device.as_object().expect("a device is an object"),
        port_prefix: topology::PORT_PREFIX,
    };
    if disk.encrypted && !Inventory::query(monitor)?.has_device(id) {
        encryption::with_key(cx, monitor, &disk.cid, |monitor| {
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

/// Unplugs the disk from the VM, if that is on, and removes its nodes and descriptors from QEMU.
pub(super) fn unplug(cx: &Context, vm: &VmRecord, disk: &HotDisk, deadline: Instant) -> Result<()> {
    // The nodes are removed once the guest has released the device.
    let until = deadline
        .checked_sub(CLEAN_UP_TIMEOUT)
        .unwrap_or(deadline)
        .max(Instant::now() + CLEAN_UP_TIMEOUT / 3);
    machine::with_monitor(cx, vm, deadline, |monitor| Ok(hotplug::detach(monitor, disk, until)?))
}

/// The names of a disk's device and nodes in QEMU.
pub(super) fn hot_disk(disk: &DiskRecord) -> HotDisk {
    hot_image(&disk.cid, &disk.current().node(&disk.cid))
}

/// The same for one of the disk's images.
pub(super) fn hot_image(disk: &DiskCid, node: &str) -> HotDisk {
    HotDisk {
        device: disk.as_str().to_owned(),
        node: node.to_owned(),
        lower_nodes: vec![blockdev::file_node(node)],
    }
}

/// The deadline for cleaning up: a call that has used up its time still removes what it has made in
/// QEMU.
pub(super) fn clean_up_deadline(deadline: Instant) -> Instant {
    deadline.max(Instant::now() + CLEAN_UP_TIMEOUT)
}
