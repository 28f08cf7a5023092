//! resize_disk: a disk grows where it is, attached or not.
//!
//! ```text
//!   record n, image n ── admitted ──► record n, grows to m ── the image grows, durably ──► image m ── record ──► record m
//!                                     │ killed here: others count m                       │ here: the next call looks
//! ```

use std::fs::File;
use std::time::{Duration, Instant};

use serde_json::json;

use super::Cpi;
use super::attachments::hot_disk;
use crate::cid::{Cid, DiskCid};
use crate::crash;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image;
use crate::qmp::hotplug::{self, Inventory};
use crate::qmp::monitor::Monitor;
use crate::qmp::query::QueryNamedBlockNodes;
use crate::store::record::DiskRecord;
use crate::store::{Guard, VmRecord};
use crate::units::{Bytes, MiB};

/// How long a QEMU that is known to be gone may still have an image open.
const CLOSING: Duration = Duration::from_millis(500);

/// Where a disk's image can be worked on. It stays so, because the VM's lock is kept.
pub(super) struct Place {
    /// The VM that has the disk, on or off.
    pub vm: Option<VmRecord>,
    /// The monitor of the QEMU whose device is on the image. `None`: nobody has the image open.
    pub monitor: Option<Monitor>,
    /// The VM's lock.
    pub lock: Option<Guard>,
}

impl Cpi {
    pub(super) fn grow_disk(&self, cid: &DiskCid, size: MiB) -> Result<()> {
        let deadline = self.deadline("resize_disk");
        let (_lock, mut disk) = self.locked_idle_disk(cid, deadline)?;
        self.grow_to(&mut disk, size, deadline)
    }

    /// Makes the disk, whose lock the caller holds, `size` large. One that has it is left as it is.
    ///
    /// # Errors
    /// [`ErrorKind::NotSupported`] before anything is changed if it is larger.
    pub(super) fn grow_to(
        &self,
        disk: &mut DiskRecord,
        size: MiB,
        deadline: Instant,
    ) -> Result<()> {
        let doing = format!("resize disk '{}' to {size}", disk.cid);
        let mut place = self.place(disk, deadline)?;
        let has = self.virtual_size(disk, &mut place)?;
        if has > size.bytes() {
            let message = format!("{doing}: it has {has}, and disks only grow");
            return Err(Error::new(ErrorKind::NotSupported, message));
        }
        if has < size.bytes() {
            self.admit_growth(disk, has, size, deadline)?;
            crash::point!("growth noted");
            if let Err(error) = self.grow_image(disk, &mut place, size.bytes()) {
                disk.resize_target = None;
                return self.store.write(disk).and(Err(error.during(doing)));
            }
            crash::point!("image grown");
        }
        if (disk.size, disk.resize_target) != (size, None) {
            (disk.size, disk.resize_target) = (size, None);
            self.store.write_disk(disk)?;
        }
        Ok(())
    }

    fn grow_image(&self, disk: &DiskRecord, place: &mut Place, size: Bytes) -> Result<()> {
        let path = self.store.disk_image(disk)?;
        let Some(monitor) = &mut place.monitor else {
            return image::grow(&path, disk.format, disk.encrypted, size);
        };
        let node = disk.current().node(&disk.cid);
        monitor.raw("block_resize", &json!({"node-name": node, "size": size.get()}))?;
        // The file's new length, whoever set it.
        File::open(&path).and_then(|file| file.sync_all()).at("flush", &path)
    }

    /// What the guest sees of the image, or would see.
    pub(super) fn virtual_size(&self, disk: &DiskRecord, place: &mut Place) -> Result<Bytes> {
        let node = disk.current().node(&disk.cid);
        if let Some(monitor) = &mut place.monitor
            && let Some(size) = node_size(monitor, &node)?
        {
            return Ok(size);
        }
        image::virtual_size(&self.store.disk_image(disk)?, disk.format, disk.encrypted)
    }

    fn admit_growth(
        &self,
        disk: &mut DiskRecord,
        has: Bytes,
        size: MiB,
        deadline: Instant,
    ) -> Result<()> {
        // What a call that was killed noted is counted already.
        let counted = has.max(disk.size_after_resize().bytes());
        let more = Bytes(size.bytes().get().saturating_sub(counted.get()));
        // Only what is reserved for a file as a whole can be reserved later; the new part is thin.
        let noted = DiskRecord { resize_target: Some(size), ..disk.clone() };
        self.admit(disk.pool.as_deref(), self.need_of_thin(more), deadline, || {
            self.store.write(&noted)
        })?;
        *disk = noted;
        Ok(())
    }

    /// Whether no QEMU has the image of `disk` open, whatever the records say: they may have been restored from a backup.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`].
    pub(super) fn is_unused_image(&self, disk: &DiskRecord) -> Result<()> {
        image::unused(&self.store.disk_image(disk)?, Instant::now() + CLOSING)
    }

    /// Finds out who has the image of `disk`, whose lock the caller holds, open.
    pub(super) fn place(&self, disk: &DiskRecord, deadline: Instant) -> Result<Place> {
        let Some(holder) = self.holder(disk, deadline)? else {
            self.is_unused_image(disk)?;
            return Ok(Place { vm: None, monitor: None, lock: None });
        };
        let (lock, vm) = self.locked_vm(&holder, deadline)?;
        let mut monitor = self.monitor(&vm, deadline)?;
        if let Some(connected) = &mut monitor
            && !Inventory::take(connected)?.has_device(disk.cid.as_str())
        {
            // The guest ejected the device by itself; the image may still be open.
            hotplug::close(connected, &hot_disk(disk), deadline)?;
            monitor = None;
        }
        if monitor.is_none() {
            self.is_unused_image(disk)?;
        }
        Ok(Place { vm: Some(vm), monitor, lock: Some(lock) })
    }
}

/// The size of a block node, if QEMU has it.
fn node_size(monitor: &mut Monitor, name: &str) -> Result<Option<Bytes>> {
    let nodes = monitor.execute(&QueryNamedBlockNodes { flat: true })?;
    Ok(nodes.into_iter().find(|node| node.name == name).map(|node| Bytes(node.image.virtual_size)))
}
