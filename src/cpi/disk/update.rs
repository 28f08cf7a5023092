//! update_disk: the size and the properties of a disk. What cannot change in place changes by a
//! copy.
//!
//! | property | how | in effect |
//! |---|---|---|
//! | size | in place, as resize_disk | at once |
//! | `iops`, `mbps` | in place | at once |
//! | `cache`, `discard` | in place | at the next attach or start; with a copy, at once |
//! | `format`, `pool`, `preallocation`, `encrypted` | by a copy | at once |
//!
//! Whether the guest sees a write cache changes with the next attach or start in any case.

use serde_json::{Map, Value};

use super::{access, copy, resize, settled};
use crate::cid::{Cid, DiskCid};
use crate::cpi::context::Context;
use crate::cpi::properties::{self, DiskCloudProperties};
use crate::error::Result;
use crate::qemu::blockdev;
use crate::schema::Whole;
use crate::store::DiskRecord;
use crate::store::record::Limits;
use crate::units::MiB;

/// Gives the disk the size and the properties. It keeps its cid.
///
/// # Errors
/// [`ErrorKind::NotSupported`](crate::error::ErrorKind::NotSupported) for a smaller size, before
/// anything is changed.
pub(in crate::cpi) fn update(
    cx: &Context,
    cid: &DiskCid,
    size: MiB,
    given: &Map<String, Value>,
) -> Result<()> {
    let deadline = cx.deadline("update_disk");
    let asked: DiskCloudProperties = properties::read(&cx.config.disk_defaults, given)?;
    properties::ensure_pool_exists(&cx.config, asked.pool.as_deref())?;
    asked.validate()?;
    let (_lock, mut disk) = settled::lock_unless_copied(cx, cid, deadline)?;
    let copies = updated(&disk, &asked, given).current() != disk.current();
    let doing = || format!("copy disk '{cid}' into another image");
    if copies {
        // A copy that cannot work is refused before the disk gets another size.
        let next = updated(&disk, &asked, given);
        copy::ensure_possible(cx, &disk, &next, size, deadline).map_err(|e| e.during(doing()))?;
    }
    resize::grow(cx, &mut disk, size, deadline)?;
    let mut next = updated(&disk, &asked, given);
    let is_delayed = match copies {
        // The device stays, and with it the write cache that it announces.
        true => next.cache.has_write_cache() != disk.cache.has_write_cache(),
        // QEMU decides both when it opens an image.
        false => (next.cache, next.discard) != (disk.cache, disk.discard),
    };
    if is_delayed {
        tracing::info!(disk = %cid, "cache and discard change when the disk is attached again");
    }
    if copies {
        next.generation = disk.generation.wrapping_add(1);
        copy::run(cx, &mut disk, &next, deadline).map_err(|e| e.during(doing()))?;
    } else {
        disk = next;
        cx.store.write_disk(&disk)?;
    }
    // Last: the repetition of a killed call sets them again.
    if let Some(mut monitor) = access::access(cx, &disk, deadline)?.monitor {
        let limits = blockdev::throttle_or_reset(cid.as_str(), disk.limits);
        monitor.raw("block_set_io_throttle", &limits)?;
    }
    Ok(())
}

/// The record of the disk with the properties asked for.
fn updated(
    disk: &DiskRecord,
    asked: &DiskCloudProperties,
    given: &Map<String, Value>,
) -> DiskRecord {
    DiskRecord {
        format: asked.format,
        pool: asked.pool.clone(),
        preallocation: asked.preallocation,
        encrypted: asked.encrypted,
        cache: asked.cache,
        discard: asked.effective_discard(),
        limits: Limits { iops: asked.iops.map(Whole::get), mbps: asked.mbps.map(Whole::get) },
        cloud_properties: given.clone(),
        ..disk.clone()
    }
}
