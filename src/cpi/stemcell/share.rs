//! Stemcells that were imported from the same file share one image.

use std::path::Path;
use std::time::Instant;

use super::format;
use crate::cpi::context::Context;
use crate::crash;
use crate::error::Result;
use crate::image::import::ImageSource;
use crate::store::layout::STEMCELL_IMAGE;
use crate::store::{Phase, Rank, StemcellRecord, beneath};
use crate::units::Bytes;

/// Links `target` to the image of a stemcell that was imported from the same file. Each of the two
/// can be deleted without the other. Returns the other's record; `None` if there is no such
/// stemcell.
pub(super) fn share(
    cx: &Context,
    stemcell: &StemcellRecord,
    source: &dyn ImageSource,
    size: Bytes,
    target: &Path,
    deadline: Instant,
) -> Result<Option<StemcellRecord>> {
    let declared = format::declared(&stemcell.cloud_properties)?;
    let may_be_same = |other: &StemcellRecord| {
        let same_size = other.source.as_ref().is_some_and(|source| source.size == size);
        let same_format =
            format::declared(&other.cloud_properties).is_ok_and(|other| other == declared);
        other.phase == Phase::Ready && other.pool == stemcell.pool && same_size && same_format
    };
    let others = cx.store.list::<StemcellRecord>()?;
    let mut others: Vec<StemcellRecord> =
        others.iter().filter_map(|cid| cx.store.read(cid).ok().flatten()).collect();
    others.retain(may_be_same);
    if others.is_empty() {
        // The usual case: without a candidate no digest is computed, which takes as long as an
        // import.
        return Ok(None);
    }
    let sha256 = source.digest(deadline)?.to_string();
    others.retain(|other| other.source.as_ref().is_some_and(|source| source.sha256 == sha256));
    for other in others {
        // A ready stemcell has a complete image. No call holds a ready stemcell's lock and waits
        // for another's.
        let lock = cx.store.lock(Rank::Stemcell, &other.cid, deadline)?;
        if !cx.store.find::<StemcellRecord>(&other.cid)?.is_some_and(|other| may_be_same(&other)) {
            lock.unlink()?;
            continue;
        }
        let dir = cx.store.images_dir(&other.cid, other.pool.as_deref())?;
        let image = dir.join(STEMCELL_IMAGE);
        match beneath::hard_link(&image, target) {
            Ok(()) => {
                crash::point!("another stemcell's image linked");
                beneath::sync_dir(target.parent().expect("an image is in a directory"))?;
                let (cid, with) = (&stemcell.cid, &other.cid);
                tracing::info!(%cid, %with, "sharing the image of a stemcell");
                return Ok(Some(other));
            }
            Err(error) => {
                let error = error.report();
                tracing::warn!(error, "cannot share a stemcell's image: importing");
            }
        }
    }
    Ok(None)
}
