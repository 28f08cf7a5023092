//! update_disk: a disk's size and properties, changed where it is as far as that can be, by a copy as far as it can not.
//!
//! | what | how | holds |
//! |---|---|---|
//! | size | in place, as resize_disk | at once |
//! | `iops`, `mbps` | in place | at once |
//! | `cache`, `discard` | in place | from the next attach or start of the VM on; with a copy, at once, but for whether the guest sees a cache |
//! | `format`, `pool`, `preallocation`, `encrypted` | by a copy | at once |

use serde_json::{Map, Value};

use super::Cpi;
use super::cloud_properties::{self, DiskCloudProperties};
use crate::cid::{Cid, DiskCid};
use crate::error::Result;
use crate::qemu::blockdev;
use crate::schema::Whole;
use crate::store::DiskRecord;
use crate::store::record::Limits;
use crate::units::MiB;

impl Cpi {
    /// Gives the disk the size and the properties. The cid stays.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::NotSupported`] for a smaller size, before anything is changed.
    pub(super) fn change_disk(
        &self,
        cid: &DiskCid,
        size: MiB,
        properties: &Map<String, Value>,
    ) -> Result<()> {
        let deadline = self.deadline("update_disk");
        let asked: DiskCloudProperties =
            cloud_properties::read(&self.config.disk_defaults, properties)?;
        self.known_pool(asked.pool.as_deref())?;
        asked.validate()?;
        let (_lock, mut disk) = self.locked_idle_disk(cid, deadline)?;
        let next = |disk: &DiskRecord| DiskRecord {
            format: asked.format,
            pool: asked.pool.clone(),
            preallocation: asked.preallocation,
            encrypted: asked.encrypted,
            cache: asked.cache,
            discard: asked.effective_discard(),
            limits: Limits { iops: asked.iops.map(Whole::get), mbps: asked.mbps.map(Whole::get) },
            cloud_properties: properties.clone(),
            ..disk.clone()
        };
        let copies = next(&disk).current() != disk.current();
        let doing = || format!("copy disk '{cid}' into another image");
        if copies {
            // What a copy would fail for is known before the disk has another size.
            self.can_copy(&disk, &next(&disk), size, deadline).map_err(|e| e.during(doing()))?;
        }
        self.grow_to(&mut disk, size, deadline)?;
        let mut next = next(&disk);
        let is_seen_later = match copies {
            // The device stays, and with it what it said of a cache.
            true => next.cache.has_write_cache() != disk.cache.has_write_cache(),
            // QEMU decides both when it opens an image.
            false => (next.cache, next.discard) != (disk.cache, disk.discard),
        };
        if is_seen_later {
            tracing::info!(disk = %cid, "cache and discard change when the disk is attached again");
        }
        if copies {
            next.generation = disk.generation.wrapping_add(1);
            self.copy_into(&mut disk, &next, deadline).map_err(|e| e.during(doing()))?;
        } else {
            disk = next;
            self.store.write_disk(&disk)?;
        }
        // Last: a call that was killed is repeated, and sets them again.
        if let Some(mut monitor) = self.place(&disk, deadline)?.monitor {
            monitor
                .raw("block_set_io_throttle", &blockdev::throttle_to(cid.as_str(), disk.limits))?;
        }
        Ok(())
    }
}
