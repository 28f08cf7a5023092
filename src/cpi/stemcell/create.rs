//! create_stemcell.

use std::time::Instant;

use serde_json::{Map, Value};

use super::light::{self, NewImage};
use super::{format, share};
use crate::cid::StemcellCid;
use crate::cpi::capacity::{self, need};
use crate::cpi::context::Context;
use crate::cpi::creation::{Creatable, Creation};
use crate::error::{Error, ErrorKind, Result};
use crate::host::clock;
use crate::image::import::{ImageSource, Import, read_by_deadline};
use crate::image::qemu_img::QemuImg;
use crate::store::layout::{SCHEMA, STEMCELL_IMAGE};
use crate::store::record::{Format, Source};
use crate::store::{Phase, StemcellRecord};
use crate::units::Bytes;

/// Log the progress of an import once for so many bytes, 256 MiB: the Director reads standard error
/// byte by byte.
const LOG_STEP: u64 = 256 << 20;

/// Imports the image, or checks the one that a light stemcell names.
pub(in crate::cpi) fn create(
    cx: &Context,
    image: &dyn ImageSource,
    properties: &Map<String, Value>,
) -> Result<StemcellCid> {
    let deadline = cx.deadline("create_stemcell");
    ensure_replicable(cx, properties)?;
    let creation = Creation::<StemcellRecord>::begin(cx, deadline)?;
    let work = |creation: &Creation<'_, StemcellRecord>| {
        let stemcell = record(cx, creation.cid().clone(), properties);
        // A compressed image takes more than its file: the import asks again as it grows.
        let need = need::import(image.allocated_size(deadline)?);
        let pool = stemcell.pool.as_deref();
        capacity::admit(cx, pool, need, deadline, || cx.store.write(&stemcell))?;
        let made = make_image(cx, &stemcell, image, properties, deadline)?;
        Ok(StemcellRecord {
            format: made.format,
            virtual_size: made.virtual_size,
            image_path: made.path,
            source: made.source,
            verified: made.verified,
            ..stemcell
        })
    };
    Ok(creation.run(work, |error| error)?.cid)
}

impl Creatable for StemcellRecord {}

/// Ensures that no other host of the group stores images for the same cid in this host's stemcell
/// pool.
///
/// # Errors
/// [`ErrorKind::BadConfig`] if the pool is shared.
fn ensure_replicable(cx: &Context, properties: &Map<String, Value>) -> Result<()> {
    let is_light = properties.contains_key("image_path");
    let is_replicated = cx.remote.as_ref().is_some_and(|remote| remote.replicated);
    let Some(pool) = cx.config.stemcell_pool.as_deref() else { return Ok(()) };
    if is_light || !is_replicated || !cx.store.pools().shared().any(|shared| shared == pool) {
        return Ok(());
    }
    let message = format!("stemcell_pool: pool '{pool}' is shared with other hosts of the group");
    Err(Error::new(ErrorKind::BadConfig, message).hint(
        "each host of a group has its own stemcells: give each a stemcell_pool that is not shared",
    ))
}

fn record(cx: &Context, cid: StemcellCid, properties: &Map<String, Value>) -> StemcellRecord {
    StemcellRecord {
        schema: SCHEMA,
        cid,
        phase: Phase::Creating,
        created_at: clock::now(),
        format: Format::Raw,
        virtual_size: Bytes(0),
        image_path: None,
        pool: cx.config.stemcell_pool.clone(),
        source: None,
        verified: None,
        cloud_properties: properties.clone(),
        newer: Map::new(),
    }
}

fn make_image(
    cx: &Context,
    stemcell: &StemcellRecord,
    source: &dyn ImageSource,
    properties: &Map<String, Value>,
    deadline: Instant,
) -> Result<NewImage> {
    if properties.contains_key("image_path") {
        let light = light::properties(properties)?;
        let allowed = cx.remote.as_ref().map(|_| cx.config.remote_callers.image_dirs.clone());
        return read_by_deadline(&light.image_path.clone(), deadline, move || {
            light::image(&light, allowed.as_deref())
        })?;
    }
    let declared = format::declared(properties)?;
    let dir = cx.store.make_images_dir(&stemcell.cid, stemcell.pool.as_deref())?;
    let target = dir.join(STEMCELL_IMAGE);
    let size = source.size();
    if let Some(size) = size
        && let Some(other) = share::share(cx, stemcell, source, size, &target, deadline)?
    {
        let StemcellRecord { format, virtual_size, source, .. } = other;
        return Ok(NewImage { format, virtual_size, path: None, source, verified: None });
    }
    let qemu_img = QemuImg::new(&cx.config.qemu.img_binary);
    let pool = stemcell.pool.as_deref();
    let grant = |need| capacity::grant(cx, pool, need, deadline);
    let (target, qemu_img) = (&target, &qemu_img);
    let import = Import { source, declared, target, qemu_img, grant: &grant, deadline };
    let imported = import.run(&mut log_progress())?;
    let source = size.map(|size| Source { sha256: imported.digest.to_string(), size });
    let (format, virtual_size) = (imported.format, imported.virtual_size);
    Ok(NewImage { format, virtual_size, path: None, source, verified: None })
}

fn log_progress() -> impl FnMut(Bytes) {
    let mut logged = 0;
    move |read| {
        if read.get() / LOG_STEP > logged {
            logged = read.get() / LOG_STEP;
            tracing::info!(mib_read = read.get() >> 20, "importing");
        }
    }
}
