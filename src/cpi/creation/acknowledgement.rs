//! Whether the caller of a create has received the new object's cid.
//!
//! The [`Marker`] is as durable as the record that says `ready`; its removal is not. An object that
//! has it, and whose create is dead, may have been acknowledged all the same, so it is not removed
//! for the marker alone: `audit` reports it. Its addresses are given away when the same Director
//! asks for them again (`cpi/vm/reclaim.rs`): otherwise one killed call would
//! keep a static address until an operator removes the VM.

use std::path::PathBuf;

use crate::cpi::context::Context;
use crate::cpi::marker::{self, Marker};
use crate::crash;
use crate::error::Result;
use crate::store::{Phase, Record, VmRecord};
use crate::sys::pidlock;

/// Marks the object as unacknowledged, before its record says `ready`.
pub(super) fn mark<R: Record>(cx: &Context, cid: &R::Cid) -> Result<()> {
    let marker = Marker::make(path::<R>(cx, cid))?;
    crash::point!("marker made");
    // A call creates one object at most.
    let _ = cx.marker.set(marker);
    Ok(())
}

/// Removes the marker: a call names the object, so its caller knows the cid.
pub(in crate::cpi) fn acknowledge<R: Record>(cx: &Context, cid: &R::Cid) {
    marker::remove(&path::<R>(cx, cid));
}

/// Whether the object's create has ended without an acknowledgement.
pub(crate) fn is_unacknowledged<R: Record>(cx: &Context, cid: &R::Cid) -> Result<bool> {
    let marker = path::<R>(cx, cid);
    // A process that holds the marker may be about to answer, and may have removed it since the
    // first look.
    Ok(marker.exists() && pidlock::holder(&marker)?.is_none() && marker.exists())
}

/// Whether the VM's create has ended without an acknowledgement, and no later call has named the
/// VM.
pub(crate) fn is_vm_unacknowledged(cx: &Context, vm: &VmRecord) -> Result<bool> {
    let named = !vm.metadata.is_empty() || !vm.disks.is_empty();
    Ok(vm.phase == Phase::Ready && !named && is_unacknowledged::<VmRecord>(cx, &vm.cid)?)
}

fn path<R: Record>(cx: &Context, cid: &R::Cid) -> PathBuf {
    cx.store.record_dir::<R>(cid).join(Marker::FILE_NAME)
}
