//! snapshot_disk, delete_snapshot, and a new disk made of a snapshot.
//!
//! A snapshot is a copy of the disk's whole image, in the same pool, and as encrypted. It shares nothing with the disk
//! but, where the filesystem can, blocks. One that QEMU makes is qcow2 also of a raw disk: into a raw file its job
//! writes the source's holes with zeros that take space (QEMU 10.0, `FALLOC_FL_ZERO_RANGE`).
//!
//! ```text
//!   pending/<snap>, record `creating` ─┬─ nobody has the image open ──► copied as a file ───────────┐
//!                                      └─ a QEMU has ──► empty image, opened by QEMU                │
//!                                                        blockdev-backup: the data of this moment   │
//!                                                        concluded ──► dismissed, closed ───────────┤
//!                                                                                                   ▼
//!                                                                     flushed ──► record `ready` ──► the cid
//! ```
//!
//! A call that is killed leaves a record `creating` whose lock is free: whoever creates something, or works on the disk,
//! ends the job, has QEMU close the image, and removes it. The disk's lock is held all the time, the VM's only while QEMU
//! is told something: a VM can be deleted meanwhile, and then there is no snapshot. Nor is there one if a VM that was off
//! is started and its guest writes to the image that is copied as a file.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::Cpi;
use super::attachments::{grace, hot_disk};
use super::copies::{progress, started, target};
use super::resize::Place;
use crate::cid::{Cid, DiskCid, SnapshotCid};
use crate::error::{Error, ErrorKind, Result};
use crate::host::clock;
use crate::image::{self, Fresh};
use crate::qemu::FileNeed;
use crate::qmp::hotplug;
use crate::qmp::job;
use crate::qmp::monitor::Monitor;
use crate::store::layout::SCHEMA;
use crate::store::record::{DiskRecord, Format, Preallocation, SnapshotRecord};
use crate::store::{Guard, Phase, Rank, VmRecord};
use crate::units::MiB;

impl Cpi {
    pub(super) fn make_snapshot(
        &self,
        disk_cid: &DiskCid,
        metadata: Map<String, Value>,
    ) -> Result<SnapshotCid> {
        let deadline = self.deadline("snapshot_disk");
        self.own_disk(disk_cid, deadline)?;
        self.store.prepare()?;
        self.clear_leftovers(deadline);
        let cid = self.new_cid::<SnapshotRecord>()?;
        let lock = self.begin::<SnapshotRecord>(Rank::Snapshot, &cid, deadline)?;
        let made = self
            .copy_to_snapshot(&cid, disk_cid, metadata, deadline)
            .and_then(|()| self.settled(&cid));
        if let Err(error) = made {
            let error = error.during(format!("make a snapshot of disk '{disk_cid}'"));
            return self.discard_snapshot(&cid, lock, grace(deadline)).and(Err(error));
        }
        Ok(cid)
    }

    fn copy_to_snapshot(
        &self,
        cid: &SnapshotCid,
        disk: &DiskCid,
        metadata: Map<String, Value>,
        deadline: Instant,
    ) -> Result<()> {
        let (_lock, disk) = self.locked_disk(disk, deadline)?;
        let mut place = self.place(&disk, deadline)?;
        // A resize that was killed left the image larger than its record says.
        let size = self.virtual_size(&disk, &mut place)?;
        let path = self.store.disk_image(&disk)?;
        let of = DiskRecord {
            size: MiB::holding(size).unwrap_or(disk.size),
            resize_target: None,
            preallocation: Preallocation::Off,
            metadata: self.metadata_of(&disk),
            ..disk
        };
        let is_live = place.monitor.is_some();
        let mut snapshot = SnapshotRecord {
            schema: SCHEMA,
            cid: cid.clone(),
            phase: Phase::Creating,
            created_at: clock::now(),
            format: if is_live { Format::Qcow2 } else { of.format },
            disk: of,
            metadata,
            newer: Map::new(),
        };
        let of = &snapshot.disk;
        let need = match is_live {
            true => self.need_of_copy(&path, &of.current(), &snapshot.image(), of.size)?,
            false => self.need_of_image(&path, of.size)?,
        };
        self.admit(of.pool.as_deref(), need, deadline, || self.store.write(&snapshot))?;
        let dir = self.store.make_images_dir(cid, snapshot.disk.pool.as_deref())?;
        let path = self.store.snapshot_image(&snapshot)?;
        match place {
            Place { vm: Some(vm), monitor: Some(monitor), lock } => {
                self.make_disk_image(&dir, &snapshot.image(), size, deadline)?;
                self.start_backup(monitor, &snapshot)?;
                // Others may use the VM meanwhile; the disk they can not.
                drop(lock);
                self.finish_backup(&snapshot, &vm, deadline)
                    .map_err(|error| self.ended(&vm.cid, error))?;
            }
            place => {
                let source = image::Source::open(&self.store.disk_image(&snapshot.disk)?)?;
                // A VM that is off may be started meanwhile: the copy sees what its guest does.
                drop(place);
                copy_file(&source, &path, &snapshot.disk.cid, deadline)?;
            }
        }
        image::sync(&path)?;
        self.untold::<SnapshotRecord>(cid)?;
        snapshot.phase = Phase::Ready;
        self.store.write(&snapshot)
    }

    fn start_backup(&self, mut monitor: Monitor, snapshot: &SnapshotRecord) -> Result<()> {
        let disk = &snapshot.disk;
        let image = FileNeed::image(
            snapshot.cid.as_str(),
            self.store.snapshot_image(snapshot)?,
            snapshot.format,
            true,
        );
        let need = FileNeed { encrypted: disk.encrypted, ..image };
        self.open_in_qemu(&mut monitor, &need, &disk.cid)?;
        let backup = json!({
            "job-id": job_id(snapshot), "device": disk.current().node(&disk.cid), "target": need.node, "sync": "full",
            "auto-dismiss": false,
        });
        monitor.raw("blockdev-backup", &backup)?;
        Ok(())
    }

    fn finish_backup(
        &self,
        snapshot: &SnapshotRecord,
        vm: &VmRecord,
        deadline: Instant,
    ) -> Result<()> {
        // At the deadline the job is looked at once more.
        let connect = || Monitor::connect(&self.store.vm(&vm.cid).qmp(), grace(deadline));
        let mut progress = progress(format!("snapshot of disk {}", snapshot.disk.cid));
        let mut monitor =
            job::follow(&connect, &job_id(snapshot), "concluded", deadline, &mut progress)?;
        job::dismiss(&mut monitor, &job_id(snapshot))?;
        Ok(hotplug::close(&mut monitor, &target(snapshot.cid.as_str()), deadline)?)
    }

    /// Removes all there is of a snapshot nobody was told of.
    fn discard_snapshot(&self, cid: &SnapshotCid, lock: Guard, deadline: Instant) -> Result<()> {
        if let Some(snapshot) = self.store.find::<SnapshotRecord>(cid)? {
            self.abandon_backup(&snapshot, deadline)?;
        }
        self.store.remove::<SnapshotRecord>(cid)?;
        lock.unlink()?;
        self.settled(cid)
    }

    fn abandon_backup(&self, snapshot: &SnapshotRecord, deadline: Instant) -> Result<()> {
        let Some(vm) = &snapshot.disk.vm else { return Ok(()) };
        let Some((_lock, mut monitor)) = self.running_vm(vm, deadline)? else { return Ok(()) };
        job::end_all(&mut monitor, |id| id == job_id(snapshot), deadline)?;
        Ok(hotplug::close(&mut monitor, &target(snapshot.cid.as_str()), deadline)?)
    }

    /// Removes what a snapshot_disk or a delete_snapshot left that was killed.
    pub(super) fn clear_snapshot(&self, cid: &SnapshotCid, deadline: Instant) -> Result<()> {
        let lock = self.store.lock(Rank::Snapshot, cid, Instant::now())?;
        match self.store.find::<SnapshotRecord>(cid)? {
            Some(snapshot) if snapshot.phase == Phase::Ready => self.settled(cid),
            _ => {
                tracing::warn!(%cid, "removing a snapshot whose creation or removal was cut short");
                self.discard_snapshot(cid, lock, deadline)
            }
        }
    }

    pub(super) fn remove_snapshot(&self, cid: &SnapshotCid) -> Result<()> {
        let record = self.store.find::<SnapshotRecord>(cid)?;
        if record.is_none() && !self.store.has_lock(Rank::Snapshot, cid) {
            return Ok(());
        }
        let deadline = self.deadline("delete_snapshot");
        let lock = self.store.lock(Rank::Snapshot, cid, deadline)?;
        if let Some(snapshot) = self.store.find::<SnapshotRecord>(cid)? {
            if snapshot.phase == Phase::Creating {
                // Its call was killed, and a QEMU may still write it.
                return self.discard_snapshot(cid, lock, deadline);
            }
            self.store.write_deleting(&SnapshotRecord { phase: Phase::Deleting, ..snapshot })?;
        }
        self.store.remove::<SnapshotRecord>(cid)?;
        lock.unlink()
    }

    /// Makes a new disk with the data of a snapshot, which stays. The disk is like the one the snapshot is of, at that
    /// time.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`] for an unknown snapshot, [`ErrorKind::NoDiskSpace`].
    pub fn restore(&self, snapshot: &SnapshotCid) -> Result<DiskCid> {
        let deadline = self.began + self.config.deadline("snapshot_disk", RESTORE);
        self.store.prepare()?;
        self.clear_leftovers(deadline);
        let snapshot_lock = self.store.lock(Rank::Snapshot, snapshot, deadline)?;
        let record = self
            .store
            .find::<SnapshotRecord>(snapshot)?
            .filter(|record| record.phase == Phase::Ready);
        let Some(record) = record else {
            snapshot_lock.unlink()?;
            return Err(Error::new(
                ErrorKind::BadRequest,
                format!("there is no snapshot '{snapshot}' on this host"),
            )
            .hint("a snapshot stays on the host that made it"));
        };
        self.is_told::<SnapshotRecord>(snapshot);
        let cid = self.new_cid::<DiskRecord>()?;
        let lock = self.begin::<DiskRecord>(Rank::Disk, &cid, deadline)?;
        let mut disk = DiskRecord {
            cid,
            phase: Phase::Creating,
            created_at: clock::now(),
            generation: 0,
            inactive_image: None,
            vm: None,
            metadata: Map::new(),
            ..record.disk.clone()
        };
        match self.copy_from_snapshot(&record, &mut disk, deadline) {
            Ok(()) => Ok(disk.cid),
            Err(error) => Err(self.undone::<DiskRecord>(
                &disk.cid,
                lock,
                error.during(format!("restore snapshot '{snapshot}'")),
            )),
        }
    }

    fn copy_from_snapshot(
        &self,
        snapshot: &SnapshotRecord,
        disk: &mut DiskRecord,
        deadline: Instant,
    ) -> Result<()> {
        let source = self.store.snapshot_image(snapshot)?;
        let need = match disk.format == snapshot.format {
            true => self.need_of_image(&source, disk.size)?,
            false => self.need_of_copy(&source, &snapshot.image(), &disk.current(), disk.size)?,
        };
        self.admit(disk.pool.as_deref(), need, deadline, || self.store.write(disk))?;
        let dir = self.store.make_images_dir(&disk.cid, disk.pool.as_deref())?;
        let target = dir.join(disk.image());
        if disk.format == snapshot.format {
            let mut progress = progress(format!("disk of snapshot {}", snapshot.cid));
            image::copy(&image::Source::open(&source)?, &target, deadline, &mut progress)?
                .sync()?;
        } else {
            self.make_disk_image(&dir, &disk.current(), disk.size.bytes(), deadline)?;
            self.fill(&source, &snapshot.image(), &target, &disk.current(), deadline)?;
        }
        image::sync(&target)?;
        self.untold::<DiskRecord>(&disk.cid)?;
        disk.phase = Phase::Ready;
        self.store.write_disk(disk)?;
        self.settled(&disk.cid)
    }
}

fn copy_file(
    source: &image::Source,
    target: &Path,
    disk: &DiskCid,
    deadline: Instant,
) -> Result<()> {
    let copied =
        image::copy(source, target, deadline, &mut progress(format!("snapshot of disk {disk}")));
    copied.and_then(Fresh::sync).map_err(started)
}

/// How long a restore may take.
const RESTORE: Duration = Duration::from_secs(3600);

/// A job of the disk's, so that a detach ends it; it names the snapshot.
fn job_id(snapshot: &SnapshotRecord) -> String {
    hot_disk(&snapshot.disk).job(snapshot.cid.as_str())
}
