//! create_disk, delete_disk, has_disk.

use std::path::Path;
use std::time::Instant;

use serde_json::{Map, Value};

use super::Cpi;
use super::cloud_properties::{self, DiskCloudProperties};
use crate::cid::DiskCid;
use crate::error::{Error, ErrorKind, Result};
use crate::host::clock;
use crate::image::NewImage;
use crate::image::qemu_img::QemuImg;
use crate::schema::Whole;
use crate::store::layout::SCHEMA;
use crate::store::record::{DiskImage, Limits};
use crate::store::{DiskKey, DiskRecord, Guard, Phase, Rank, atomic};
use crate::units::{Bytes, MiB};

impl Cpi {
    pub(super) fn make_disk(&self, size: MiB, properties: &Map<String, Value>) -> Result<DiskCid> {
        let deadline = self.deadline("create_disk");
        let asked: DiskCloudProperties =
            cloud_properties::read(&self.config.disk_defaults, properties)?;
        self.known_pool(asked.pool.as_deref())?;
        asked.validate()?;
        self.store.prepare()?;
        self.clear_leftovers(deadline);
        let cid = self.new_cid::<DiskRecord>()?;
        let lock = self.begin::<DiskRecord>(Rank::Disk, &cid, deadline)?;
        let mut disk = new_record(cid, size, &asked, properties);
        let need = self.need_of_disk(disk.size, &disk.current());
        let made = self
            .admit(disk.pool.as_deref(), need, deadline, || self.store.write(&disk))
            .and_then(|()| {
                let dir = self.store.make_images_dir(&disk.cid, disk.pool.as_deref())?;
                self.make_disk_image(&dir, &disk.current(), size.bytes(), deadline)?;
                self.untold::<DiskRecord>(&disk.cid)?;
                disk.phase = Phase::Ready;
                self.store.write_disk(&disk)?;
                self.settled(&disk.cid)
            });
        match made {
            Ok(()) => Ok(disk.cid),
            Err(error) => Err(self.undone::<DiskRecord>(
                &disk.cid,
                lock,
                error.during(format!("create a disk of {size}")),
            )),
        }
    }

    /// Makes `image`, empty, in `dir`; it is durable then.
    pub(super) fn make_disk_image(
        &self,
        dir: &Path,
        image: &DiskImage,
        size: Bytes,
        deadline: Instant,
    ) -> Result<()> {
        let key = DiskKey::from_config(&self.config);
        if image.encrypted {
            key.create_if_missing(&self.store, deadline)?;
        }
        let new = NewImage {
            path: &dir.join(image.file_name()),
            format: image.format,
            size,
            preallocation: image.preallocation,
            key: image.encrypted.then(|| key.path()),
        };
        new.create(&QemuImg::new(&self.config.qemu.img_binary), deadline)?.sync()?;
        atomic::sync_dir(dir)
    }

    pub(super) fn remove_disk(&self, cid: &DiskCid) -> Result<()> {
        let deadline = self.deadline("delete_disk");
        let (lock, mut disk) = loop {
            self.adopt(cid, deadline)?;
            if !atomic::entry_exists(&self.store.disk_dir(cid))
                && !self.store.has_lock(Rank::Disk, cid)
            {
                return self
                    .store
                    .ensure_mounted()
                    .and_then(|()| self.store.ensure_not_owned_elsewhere(cid));
            }
            let lock = self.disk_lock(cid, deadline)?;
            match self.store.find::<DiskRecord>(cid)? {
                Some(disk) => break (lock, disk),
                // It was given up while its lock was waited for.
                None if self.store.can_take(cid)? => {}
                None => {
                    self.store.ensure_not_owned_elsewhere(cid)?;
                    // All but the directory or the lock is gone: a removal was cut short at its last steps.
                    return self.forget_disk(
                        cid,
                        lock,
                        self.store.lock(Rank::Metadata, cid, deadline)?,
                    );
                }
            }
        };
        self.store.ensure_owned(&disk)?;
        self.settle_copy(&mut disk, deadline)?;
        if let Some(holder) = self.holder(&disk, deadline)? {
            return Err(Error::new(
                ErrorKind::Conflict,
                format!("disk '{cid}' is attached to VM '{holder}'"),
            )
            .hint("detach it first"));
        }
        self.is_unused_image(&disk)?;
        let metadata = self.store.lock(Rank::Metadata, cid, deadline)?;
        disk.phase = Phase::Deleting;
        self.store.write_deleting(&disk)?;
        self.forget_disk(cid, lock, metadata)
    }

    /// Removes what there is of a disk here, with its images unless another host has it. The lock of its metadata keeps others
    /// from writing that where there is no disk.
    pub(super) fn forget_disk(&self, cid: &DiskCid, lock: Guard, metadata: Guard) -> Result<()> {
        match self
            .store
            .read::<DiskRecord>(cid)?
            .map_or(Ok(()), |disk| self.store.ensure_owned(&disk))
        {
            Err(error) if error.kind() == ErrorKind::Conflict => self.store.remove_local(cid)?,
            ours => ours.and_then(|()| self.store.remove::<DiskRecord>(cid))?,
        }
        metadata.unlink()?;
        lock.unlink()
    }

    pub(super) fn disk_exists(&self, cid: &DiskCid) -> Result<bool> {
        match self.store.find::<DiskRecord>(cid)? {
            Some(disk) => Ok(disk.phase != Phase::Creating),
            None if self.store.can_take(cid)? => Ok(true),
            // "No" would have the disk forgotten.
            None => self.store.ensure_not_owned_elsewhere(cid).map(|()| false),
        }
    }
}

fn new_record(
    cid: DiskCid,
    size: MiB,
    asked: &DiskCloudProperties,
    properties: &Map<String, Value>,
) -> DiskRecord {
    DiskRecord {
        schema: SCHEMA,
        cid,
        phase: Phase::Creating,
        created_at: clock::now(),
        size,
        resize_target: None,
        generation: 0,
        format: asked.format,
        pool: asked.pool.clone(),
        cache: asked.cache,
        discard: asked.effective_discard(),
        preallocation: asked.preallocation,
        encrypted: asked.encrypted,
        inactive_image: None,
        vm: None,
        limits: Limits { iops: asked.iops.map(Whole::get), mbps: asked.mbps.map(Whole::get) },
        cloud_properties: properties.clone(),
        metadata: Map::new(),
        newer: Map::new(),
    }
}
