//! snapshot_disk, delete_snapshot.
//!
//! A snapshot is a copy of the disk's whole image, in the same pool, and encrypted if the disk is.
//! It shares blocks with the disk where the filesystem can (reflinks), and nothing else. A snapshot
//! that QEMU makes is qcow2, even of a raw disk: its job fills the holes of a raw target with zeros
//! that take space (QEMU 10.0, `FALLOC_FL_ZERO_RANGE`).
//!
//! ```text
//!   begin ─► record `creating` ─┬─ no QEMU has the image open ─► copied as a file ──────────────┐
//!                               └─ a QEMU has ─► empty image, opened by QEMU                    │
//!                                                blockdev-backup: the data of this moment       │
//!                                                concluded ─► dismissed, closed ────────────────┤
//!                                                                                               ▼
//!                                                                         flushed ─► commit ─► cid
//! ```
//!
//! The next create, or the next call on the disk, rolls back an interrupted snapshot: it ends the
//! job, has QEMU close the image, and removes it. The disk's lock is held until the end, the VM's
//! only while a QMP command runs. So the VM can be deleted meanwhile; then there is no snapshot.
//! There is none either if a VM that was off is started and its guest writes to the image that is
//! copied as a file.

use std::path::Path;
use std::time::Instant;

use serde_json::Map;

use super::access::{self, Access};
use super::{backup, images, metadata, ownership, progress, settled};
use crate::cid::{DiskCid, SnapshotCid};
use crate::cpi::capacity::{self, need};
use crate::cpi::context::Context;
use crate::cpi::contract::Metadata;
use crate::cpi::creation::{Creatable, Creation, pending};
use crate::cpi::machine;
use crate::error::{Error, Result};
use crate::host::clock;
use crate::image::{self, UnsyncedFile};
use crate::store::layout::SCHEMA;
use crate::store::record::{Format, Preallocation};
use crate::store::{DiskRecord, Guard, Phase, Rank, SnapshotRecord};
use crate::units::{Bytes, MiB};

/// Creates a snapshot of the disk.
pub(in crate::cpi) fn create(
    cx: &Context,
    disk: &DiskCid,
    metadata: Metadata,
) -> Result<SnapshotCid> {
    let deadline = cx.deadline("snapshot_disk");
    ownership::owned(cx, disk, deadline)?;
    let creation = Creation::<SnapshotRecord>::begin(cx, deadline)?;
    // Held until the snapshot is ready.
    let mut disk_lock = None;
    let work = |creation: &Creation<'_, SnapshotRecord>| {
        let (lock, disk) = settled::lock(cx, disk, deadline)?;
        disk_lock = Some(lock);
        copy(cx, creation.cid(), disk, metadata, deadline)
    };
    let explain = |error: Error| error.during(format!("create a snapshot of disk '{disk}'"));
    Ok(creation.run(work, explain)?.cid)
}

impl Creatable for SnapshotRecord {
    fn roll_back(cx: &Context, cid: &SnapshotCid, lock: Guard, deadline: Instant) -> Result<()> {
        backup::discard(cx, cid, lock, deadline)
    }
}

fn copy(
    cx: &Context,
    cid: &SnapshotCid,
    disk: DiskRecord,
    metadata: Metadata,
    deadline: Instant,
) -> Result<SnapshotRecord> {
    let mut access = access::access(cx, &disk, deadline)?;
    // An interrupted resize has left the image larger than the record says.
    let size = access::virtual_size(cx, &disk, &mut access)?;
    let source = cx.store.disk_image(&disk)?;
    let is_live = access.monitor.is_some();
    let snapshot = record(cx, cid, disk, size, is_live, metadata);
    let disk = &snapshot.disk;
    let need = match is_live {
        true => need::copy(cx, &source, &disk.current(), &snapshot.image(), disk.size)?,
        false => need::image(cx, &source, disk.size)?,
    };
    capacity::admit(cx, disk.pool.as_deref(), need, deadline, || cx.store.write(&snapshot))?;
    let dir = cx.store.make_images_dir(cid, disk.pool.as_deref())?;
    let target = cx.store.snapshot_image(&snapshot)?;
    match access {
        Access { vm: Some(vm), monitor: Some(monitor), vm_lock } => {
            images::create(cx, &dir, &snapshot.image(), size, deadline)?;
            backup::start(cx, monitor, &snapshot)?;
            // Other calls may use the VM meanwhile, but not the disk.
            drop(vm_lock);
            backup::finish(cx, &snapshot, &vm, deadline)
                .map_err(|error| machine::explain_exit(cx, &vm.cid, error))?;
        }
        access => {
            let source = image::CopySource::open(&source)?;
            // A VM that is off may be started meanwhile: the copy notices what its guest writes.
            drop(access);
            copy_file(&source, &target, &disk.cid, deadline)?;
        }
    }
    image::sync(&target)?;
    Ok(snapshot)
}

fn record(
    cx: &Context,
    cid: &SnapshotCid,
    disk: DiskRecord,
    size: Bytes,
    is_live: bool,
    metadata: Metadata,
) -> SnapshotRecord {
    SnapshotRecord {
        schema: SCHEMA,
        cid: cid.clone(),
        phase: Phase::Creating,
        created_at: clock::now(),
        format: if is_live { Format::Qcow2 } else { disk.format },
        disk: DiskRecord {
            size: MiB::holding(size).unwrap_or(disk.size),
            resize_target: None,
            preallocation: Preallocation::Off,
            metadata: metadata::metadata_of(cx, &disk),
            ..disk
        },
        metadata,
        newer: Map::new(),
    }
}

fn copy_file(
    source: &image::CopySource,
    target: &Path,
    disk: &DiskCid,
    deadline: Instant,
) -> Result<()> {
    let mut progress = progress::log(format!("snapshot of disk {disk}"));
    let copied = image::copy(source, target, deadline, &mut progress);
    copied.and_then(UnsyncedFile::sync).map_err(images::explain_started)
}

/// Deletes the snapshot.
pub(in crate::cpi) fn delete(cx: &Context, cid: &SnapshotCid) -> Result<()> {
    let record = cx.store.find::<SnapshotRecord>(cid)?;
    if record.is_none() && !cx.store.has_lock(Rank::Snapshot, cid) {
        return Ok(());
    }
    let deadline = cx.deadline("delete_snapshot");
    let lock = cx.store.lock(Rank::Snapshot, cid, deadline)?;
    if let Some(snapshot) = cx.store.find::<SnapshotRecord>(cid)? {
        if snapshot.phase == Phase::Creating {
            // Its snapshot_disk was killed, and a QEMU may still write the image.
            return backup::discard(cx, cid, lock, deadline);
        }
        cx.store.write_deleting(&SnapshotRecord { phase: Phase::Deleting, ..snapshot })?;
    }
    cx.store.remove::<SnapshotRecord>(cid)?;
    lock.unlink()?;
    pending::remove(cx, cid)
}
