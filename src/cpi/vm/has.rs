//! has_vm.

use crate::cid::VmCid;
use crate::cpi::context::Context;
use crate::error::Result;
use crate::store::{Phase, VmRecord};

/// Whether the VM exists, on or off.
pub(in crate::cpi) fn exists(cx: &Context, cid: &VmCid) -> Result<bool> {
    // The caller of a create that has not ended does not have the cid.
    Ok(cx.store.find::<VmRecord>(cid)?.is_some_and(|vm| vm.phase != Phase::Creating))
}
