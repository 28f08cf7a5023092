//! create_disk, delete_disk, has_disk.

use serde_json::{Map, Value};

use super::Cpi;
use super::cloud_properties::{self, DiskCloudProperties};
use crate::cid::{Cid, DiskCid};
use crate::error::{Error, ErrorKind, Result};
use crate::host::clock;
use crate::image;
use crate::schema::Whole;
use crate::store::layout::SCHEMA;
use crate::store::record::{Format, Limits, Preallocation};
use crate::store::{DiskRecord, Phase, Rank};
use crate::units::MiB;

impl Cpi {
    pub(super) fn make_disk(&self, size: MiB, properties: &Map<String, Value>) -> Result<DiskCid> {
        let deadline = self.deadline("create_disk");
        let asked: DiskCloudProperties = cloud_properties::read(&self.config.disk_defaults, properties)?;
        self.known_pool(asked.pool.as_deref())?;
        if asked.encrypted || asked.preallocation != Preallocation::Off {
            let message = "cloud_properties: 'encrypted' and 'preallocation' are not implemented";
            return Err(Error::new(ErrorKind::NotSupported, message));
        }
        self.store.prepare()?;
        self.clear_leftovers();
        let cid = DiskCid::random();
        let lock = self.begin(Rank::Disk, &cid, deadline)?;
        let mut disk = DiskRecord {
            schema: SCHEMA,
            cid,
            phase: Phase::Creating,
            created_at: clock::now(),
            size,
            generation: 0,
            format: asked.format,
            pool: asked.pool,
            cache: asked.cache,
            discard: asked.discard.unwrap_or_default(),
            preallocation: asked.preallocation,
            encrypted: asked.encrypted,
            leftover: None,
            vm: None,
            limits: Limits { iops: asked.iops.map(Whole::get), mbps: asked.mbps.map(Whole::get) },
            cloud_properties: properties.clone(),
            metadata: Map::new(),
            newer: Map::new(),
        };
        let made = self.store.write(&disk).and_then(|()| {
            let path = self.store.make_images_dir(&disk.cid, disk.pool.as_deref())?.join(disk.image());
            let image = match disk.format {
                Format::Qcow2 => image::qcow2::create(&path, size.bytes(), None)?,
                Format::Raw => image::raw::create(&path, size.bytes())?,
            };
            image.sync()?;
            disk.phase = Phase::Ready;
            self.store.write(&disk)?;
            self.settled(&disk.cid)
        });
        if let Err(error) = made {
            self.store.remove::<DiskRecord>(&disk.cid)?;
            lock.retire()?;
            self.settled(&disk.cid)?;
            return Err(error.during(format!("create a disk of {size}")));
        }
        Ok(disk.cid)
    }

    pub(super) fn remove_disk(&self, cid: &DiskCid) -> Result<()> {
        let dir = self.store.disk_dir(cid);
        if !dir.exists() && !self.store.has_lock(Rank::Disk, cid) {
            return Ok(());
        }
        let deadline = self.deadline("delete_disk");
        let lock = self.store.lock(Rank::Disk, cid, deadline)?;
        let Some(mut disk) = self.store.read::<DiskRecord>(cid)? else {
            if std::fs::remove_dir(&dir).is_ok() || !dir.exists() {
                // All but the directory or the lock was gone: a removal was cut short at its last steps.
                return lock.retire();
            }
            // The record is written first and removed last: an image without one was not left by us.
            return Err(Error::new(ErrorKind::Corrupt, format!("disk '{cid}' has files but no record"))
                .hint(format!("look into '{}' and remove it by hand", dir.display())));
        };
        if let Some(holder) = self.holder(&disk, deadline)? {
            return Err(Error::new(ErrorKind::Conflict, format!("disk '{cid}' is attached to VM '{holder}'"))
                .hint("detach it first"));
        }
        disk.phase = Phase::Deleting;
        self.store.write_deleting(&disk)?;
        self.store.remove::<DiskRecord>(cid)?;
        lock.retire()
    }

    pub(super) fn disk_exists(&self, cid: &DiskCid) -> Result<bool> {
        Ok(self.store.read::<DiskRecord>(cid)?.is_some_and(|disk| disk.phase != Phase::Creating))
    }
}
