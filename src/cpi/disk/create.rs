//! create_disk.

use std::time::Instant;

use serde_json::{Map, Value};

use super::images;
use crate::cid::DiskCid;
use crate::cpi::capacity::{self, need};
use crate::cpi::context::Context;
use crate::cpi::creation::{Creatable, Creation};
use crate::cpi::properties::{self, DiskCloudProperties};
use crate::error::Result;
use crate::host::clock;
use crate::schema::Whole;
use crate::store::layout::SCHEMA;
use crate::store::record::Limits;
use crate::store::{DiskRecord, Phase};
use crate::units::MiB;

/// Creates an empty disk.
pub(in crate::cpi) fn create(
    cx: &Context,
    size: MiB,
    given: &Map<String, Value>,
) -> Result<DiskCid> {
    let deadline = cx.deadline("create_disk");
    let properties: DiskCloudProperties = properties::read(&cx.config.disk_defaults, given)?;
    properties::ensure_pool_exists(&cx.config, properties.pool.as_deref())?;
    properties.validate()?;
    let creation = Creation::<DiskRecord>::begin(cx, deadline)?;
    let disk = creation.run(
        |creation| make(cx, record(creation.cid().clone(), size, &properties, given), deadline),
        |error| error.during(format!("create a disk of {size}")),
    )?;
    Ok(disk.cid)
}

fn make(cx: &Context, disk: DiskRecord, deadline: Instant) -> Result<DiskRecord> {
    let image = disk.current();
    let need = need::disk(cx, disk.size, &image);
    capacity::admit(cx, disk.pool.as_deref(), need, deadline, || cx.store.write(&disk))?;
    let dir = cx.store.make_images_dir(&disk.cid, disk.pool.as_deref())?;
    images::create(cx, &dir, &image, disk.size.bytes(), deadline)?;
    Ok(disk)
}

impl Creatable for DiskRecord {
    /// In a shared pool the owner file beside the image is written, too.
    fn write_ready(&self, cx: &Context) -> Result<()> {
        cx.store.write_disk(self)
    }
}

fn record(
    cid: DiskCid,
    size: MiB,
    properties: &DiskCloudProperties,
    given: &Map<String, Value>,
) -> DiskRecord {
    DiskRecord {
        schema: SCHEMA,
        cid,
        phase: Phase::Creating,
        created_at: clock::now(),
        size,
        resize_target: None,
        generation: 0,
        format: properties.format,
        pool: properties.pool.clone(),
        cache: properties.cache,
        discard: properties.effective_discard(),
        preallocation: properties.preallocation,
        encrypted: properties.encrypted,
        inactive_image: None,
        vm: None,
        limits: Limits {
            iops: properties.iops.map(Whole::get),
            mbps: properties.mbps.map(Whole::get),
        },
        cloud_properties: given.clone(),
        metadata: Map::new(),
        newer: Map::new(),
    }
}
