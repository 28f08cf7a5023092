//! attach_disk. [`attachment`] draws the states.

use std::time::{Duration, Instant};

use super::{attachment, settled};
use crate::agent::settings::device_path;
use crate::cid::{Cid, DiskCid, VmCid};
use crate::cpi::context::Context;
use crate::cpi::contract::DiskHint;
use crate::cpi::machine;
use crate::error::{Error, ErrorKind, Result};
use crate::store::atomic::Staged;
use crate::store::record::AttachmentPhase::{Attached, Attaching, Detaching};
use crate::store::{DiskRecord, VmRecord};

/// How long an attach waits for a guest to finish an earlier detach. A guest that does not do so
/// now does not do so later.
const EARLIER_DETACH_TIMEOUT: Duration = Duration::from_secs(10);

/// Attaches the disk. The hint is the same for every current agent and over every reboot of the VM.
pub(in crate::cpi) fn attach(cx: &Context, vm_cid: &VmCid, disk_cid: &DiskCid) -> Result<DiskHint> {
    let deadline = cx.deadline("attach_disk");
    machine::find(cx, vm_cid)?;
    let (_disk_lock, mut disk) = settled::lock(cx, disk_cid, deadline)?;
    let holder = attachment::settle(cx, &disk, deadline)?;
    if let Some(other) = holder.filter(|holder| holder != vm_cid) {
        let message = format!("disk '{disk_cid}' is attached to VM '{other}'");
        return Err(Error::new(ErrorKind::Conflict, message).hint("detach it there first"));
    }
    let (_vm_lock, mut vm) = machine::lock(cx, vm_cid, deadline)?;
    // Fails before anything is written if the VM may be on without a pid file.
    machine::power(cx, vm_cid)?;
    let phase = vm.attachment(disk_cid).map(|attachment| attachment.phase);
    if phase.is_none() {
        ensure_slot_left(&vm)?;
    }
    if disk.vm.as_ref() != Some(vm_cid) {
        disk.vm = Some(vm_cid.clone());
        cx.store.write(&disk)?;
    }
    let doing = || format!("attach disk '{disk_cid}' to VM '{vm_cid}'");
    let hint = DiskHint { path: device_path(disk_cid.as_str()) };
    match phase {
        // An earlier call has answered: the disk stays attached even if this one fails.
        Some(Attached) => {
            attachment::plug(cx, &vm, &disk, deadline).map_err(|e| e.during(doing()))?;
            return Ok(hint);
        }
        // The guest was asked to release the disk and may do so while it is mounted again: that
        // must end first.
        Some(Detaching) => {
            let until = deadline.min(Instant::now() + EARLIER_DETACH_TIMEOUT);
            attachment::unplug(cx, &vm, &attachment::hot_disk(&disk), until)
                .map_err(|e| e.during(format!("finish an earlier detach, to {}", doing())))?;
        }
        Some(Attaching) | None => attachment::set_phase(cx, &mut vm, disk_cid, Attaching)?,
    }
    vm.set_attachment(disk_cid, Attached);
    // The record is on the filesystem before the guest gets the disk: a full filesystem cannot come
    // between.
    let attached = cx.store.stage(&vm).and_then(|record| {
        attachment::plug(cx, &vm, &disk, deadline)?;
        record.commit()
    });
    attached.map(|()| hint).map_err(|error| {
        if let Err(left) = undo(cx, &mut vm, &disk) {
            // The next call on the disk settles it.
            let error = left.report();
            tracing::warn!(disk = %disk_cid, error, "cannot undo a failed attach yet");
        }
        error.during(doing())
    })
}

fn ensure_slot_left(vm: &VmRecord) -> Result<()> {
    let slots = vm.machine.hotplug_slots as usize;
    let used = vm.disks.iter().filter(|attachment| attachment.phase != Attaching).count();
    if used < slots {
        return Ok(());
    }
    let message = format!("all {slots} disk slots of VM '{}' are used", vm.cid);
    Err(Error::new(ErrorKind::NotSupported, message)
        .hint("recreate the VM with a larger cloud property 'extra_disks_slots'"))
}

/// Undoes an attach that failed, with a deadline of its own: the call may have used up its time.
fn undo(cx: &Context, vm: &mut VmRecord, disk: &DiskRecord) -> Result<()> {
    let deadline = Instant::now() + attachment::CLEAN_UP_TIMEOUT;
    if machine::has_device(cx, vm, &disk.cid, deadline)? {
        // Written first: the guest may release the disk after this call has stopped waiting.
        attachment::set_phase(cx, vm, &disk.cid, Detaching)?;
    }
    attachment::unplug(cx, vm, &attachment::hot_disk(disk), deadline)?;
    let released = attachment::stage_release(cx, vm, &disk.cid, Some(disk))?;
    released.into_iter().try_for_each(Staged::commit)
}
