//! detach_disk. [`attachment`] draws the states.

use super::{attachment, copy, lock};
use crate::cid::{Cid, DiskCid, VmCid};
use crate::cpi::context::Context;
use crate::cpi::machine;
use crate::error::Result;
use crate::store::DiskRecord;
use crate::store::atomic::Staged;
use crate::store::record::AttachmentPhase::Detaching;

/// Detaches the disk, and returns when the guest has released it. A disk that is not attached is a
/// success.
pub(in crate::cpi) fn detach(cx: &Context, vm_cid: &VmCid, disk_cid: &DiskCid) -> Result<()> {
    let deadline = cx.deadline("detach_disk");
    machine::find(cx, vm_cid)?;
    let disk_lock = lock::lock(cx, disk_cid, deadline)?;
    let mut disk = cx.store.find::<DiskRecord>(disk_cid)?;
    let (_lock, _short_lock) = match &mut disk {
        Some(disk) => {
            // Of a disk that another host owns, or whose pool does not answer, only the VM's record
            // is changed.
            if disk.inactive_image.is_some() && cx.store.ensure_owned(disk).is_ok() {
                copy::settle(cx, disk, deadline)?;
            }
            (Some(disk_lock), None)
        }
        // A disk without a record leaves no lock file behind.
        None => (None, Some(disk_lock.into_short_lock())),
    };
    let hot = match &disk {
        Some(disk) => attachment::hot_disk(disk),
        None => attachment::hot_image(disk_cid, disk_cid.as_str()),
    };
    let (_vm_lock, mut vm) = machine::lock(cx, vm_cid, deadline)?;
    machine::power(cx, vm_cid)?;
    // The records are on the filesystem before the guest releases the disk: a full filesystem
    // cannot come between.
    let released = attachment::stage_release(cx, &vm, disk_cid, disk.as_ref())?;
    if vm.attachment(disk_cid).is_some() {
        attachment::set_phase(cx, &mut vm, disk_cid, Detaching)?;
    }
    // QEMU is asked even if the record does not list the disk: an attach may have been interrupted
    // before it wrote that.
    if let Err(error) = attachment::unplug(cx, &vm, &hot, deadline) {
        // The phase stays `detaching`: the VM has the disk, also after a restart, until the guest
        // releases it.
        return Err(error.during(format!("detach disk '{disk_cid}' from VM '{vm_cid}'")));
    }
    released.into_iter().try_for_each(Staged::commit)
}
