//! The stemcell of a new VM.

use crate::cid::StemcellCid;
use crate::cpi::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::store::StemcellRecord;

/// The record of a stemcell that is ready.
///
/// # Errors
/// [`ErrorKind::StemcellNotFound`].
pub(in crate::cpi) fn find(cx: &Context, cid: &StemcellCid) -> Result<StemcellRecord> {
    cx.ready::<StemcellRecord>(cid)?.ok_or_else(|| {
        Error::new(ErrorKind::StemcellNotFound, format!("there is no stemcell '{cid}'"))
            .hint("upload it again: `bosh upload-stemcell --fix`")
    })
}
