//! update_disk: a disk's size and properties, changed where it is as far as that can be, by a copy as far as it can not.

use std::time::Instant;

use serde_json::{Map, Value};

use super::Cpi;
use super::cloud_properties::{self, DiskCloudProperties};
use crate::cid::{Cid, DiskCid};
use crate::error::Result;
use crate::qemu::blockdev;
use crate::schema::Whole;
use crate::store::DiskRecord;
use crate::store::record::{DiskImage, Limits};
use crate::units::MiB;

impl Cpi {
    /// Gives the disk the size and the properties. The cid stays.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::NotSupported`] for a smaller size, before anything is changed.
    pub(super) fn change_disk(&self, cid: &DiskCid, size: MiB, properties: &Map<String, Value>) -> Result<()> {
        let deadline = self.deadline("update_disk");
        let asked: DiskCloudProperties = cloud_properties::read(&self.config.disk_defaults, properties)?;
        self.known_pool(asked.pool.as_deref())?;
        asked.validate()?;
        let (_lock, mut disk) = self.locked_idle_disk(cid, deadline)?;
        self.grow_to(&mut disk, size, deadline)?;
        let wanted = DiskImage {
            generation: disk.generation,
            format: asked.format,
            pool: asked.pool.clone(),
            preallocation: asked.preallocation,
            encrypted: asked.encrypted,
        };
        if wanted != disk.current() {
            let next = DiskImage { generation: disk.generation.wrapping_add(1), ..wanted };
            self.copy_into(&mut disk, next, deadline)
                .map_err(|e| e.during(format!("copy disk '{cid}' into another image")))?;
        }
        self.change_in_place(&mut disk, &asked, properties, deadline)
    }

    /// What takes no copy. Limits hold at once; `cache` and `discard` from the next attach_disk or start of the VM on,
    /// because they are decided when QEMU opens an image.
    fn change_in_place(
        &self,
        disk: &mut DiskRecord,
        asked: &DiskCloudProperties,
        properties: &Map<String, Value>,
        deadline: Instant,
    ) -> Result<()> {
        let limits = Limits { iops: asked.iops.map(Whole::get), mbps: asked.mbps.map(Whole::get) };
        let (cache, discard) = (asked.cache, asked.effective_discard());
        let reopen = (disk.cache, disk.discard) != (cache, discard);
        *disk = DiskRecord { limits, cache, discard, cloud_properties: properties.clone(), ..disk.clone() };
        let place = self.place(disk, deadline)?;
        // Written first: a call that is killed after it is repeated, and the limits below are set again.
        self.store.write(disk)?;
        if let Some(mut monitor) = place.monitor {
            if reopen {
                tracing::info!(disk = %disk.cid, "cache and discard change when the disk is attached again");
            }
            monitor.raw("block_set_io_throttle", &blockdev::throttle_to(disk.cid.as_str(), limits))?;
        }
        Ok(())
    }
}
