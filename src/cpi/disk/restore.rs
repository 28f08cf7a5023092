//! `disk restore`: a new disk with the data of a snapshot.

use std::time::Instant;

use serde_json::Map;

use super::{images, progress};
use crate::cid::{DiskCid, SnapshotCid};
use crate::cpi::capacity::{self, need};
use crate::cpi::context::Context;
use crate::cpi::creation::{Creation, acknowledgement};
use crate::error::{Error, ErrorKind, Result};
use crate::host::clock;
use crate::image;
use crate::store::{DiskRecord, Phase, Rank, SnapshotRecord};

/// Creates a disk with the data of the snapshot, which stays. The disk has the size and properties
/// that the snapshot's disk had.
///
/// # Errors
/// [`ErrorKind::BadRequest`] for an unknown snapshot, [`ErrorKind::NoDiskSpace`].
pub(in crate::cpi) fn restore(cx: &Context, cid: &SnapshotCid) -> Result<DiskCid> {
    let deadline = cx.deadline("snapshot_disk");
    cx.store.prepare()?;
    let snapshot_lock = cx.store.lock(Rank::Snapshot, cid, deadline)?;
    let Some(snapshot) = cx.ready::<SnapshotRecord>(cid)? else {
        snapshot_lock.unlink()?;
        let message = format!("there is no snapshot '{cid}' on this host");
        return Err(Error::new(ErrorKind::BadRequest, message)
            .hint("run this on the host that made the snapshot"));
    };
    acknowledgement::acknowledge::<SnapshotRecord>(cx, cid);
    let creation = Creation::<DiskRecord>::begin(cx, deadline)?;
    let disk = creation.run(
        |creation| make(cx, record(creation.cid().clone(), &snapshot), &snapshot, deadline),
        |error| error.during(format!("restore snapshot '{cid}'")),
    )?;
    Ok(disk.cid)
}

fn record(cid: DiskCid, snapshot: &SnapshotRecord) -> DiskRecord {
    DiskRecord {
        cid,
        phase: Phase::Creating,
        created_at: clock::now(),
        generation: 0,
        inactive_image: None,
        vm: None,
        metadata: Map::new(),
        ..snapshot.disk.clone()
    }
}

fn make(
    cx: &Context,
    disk: DiskRecord,
    snapshot: &SnapshotRecord,
    deadline: Instant,
) -> Result<DiskRecord> {
    let source = cx.store.snapshot_image(snapshot)?;
    let is_same_format = disk.format == snapshot.format;
    let need = match is_same_format {
        true => need::image(cx, &source, disk.size)?,
        false => need::copy(cx, &source, &snapshot.image(), &disk.current(), disk.size)?,
    };
    capacity::admit(cx, disk.pool.as_deref(), need, deadline, || cx.store.write(&disk))?;
    let dir = cx.store.make_images_dir(&disk.cid, disk.pool.as_deref())?;
    let target = dir.join(disk.image());
    if is_same_format {
        let mut progress = progress::log(format!("disk of snapshot {}", snapshot.cid));
        let source = image::CopySource::open(&source)?;
        image::copy(&source, &target, deadline, &mut progress)?.sync()?;
    } else {
        images::create(cx, &dir, &disk.current(), disk.size.bytes(), deadline)?;
        images::fill(cx, &source, &snapshot.image(), &target, &disk.current(), deadline)?;
    }
    image::sync(&target)?;
    Ok(disk)
}
