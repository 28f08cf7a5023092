//! set_vm_metadata.

use crate::cid::VmCid;
use crate::cpi::context::Context;
use crate::cpi::contract::Metadata;
use crate::cpi::machine;
use crate::error::Result;

/// Replaces the VM's tags in its record, which `vm list` shows. The guest does not see them.
pub(in crate::cpi) fn set_metadata(cx: &Context, cid: &VmCid, metadata: Metadata) -> Result<()> {
    let (_lock, mut vm) = machine::lock(cx, cid, cx.deadline("set_vm_metadata"))?;
    vm.metadata = metadata;
    cx.store.write(&vm)
}
