//! set_vm_metadata, set_disk_metadata: kept in the state directory, a VM's shown by `vm list`; the guest is never touched.

use serde_json::{Map, Value};

use super::Cpi;
use crate::cid::{DiskCid, VmCid};
use crate::error::Result;
use crate::store::{DiskRecord, Rank};

impl Cpi {
    pub(super) fn describe_vm(&self, cid: &VmCid, metadata: Map<String, Value>) -> Result<()> {
        let (_lock, mut vm) = self.locked_vm(cid, self.deadline("set_vm_metadata"))?;
        vm.metadata = metadata;
        self.store.write(&vm)
    }

    /// Without the disk's lock, which a snapshot or a copy of it has for hours.
    pub(super) fn describe_disk(&self, cid: &DiskCid, metadata: &Map<String, Value>) -> Result<()> {
        let deadline = self.deadline("set_disk_metadata");
        self.own_disk(cid, deadline)?;
        let _lock = self.store.lock(Rank::Metadata, cid, deadline)?.into_short_lock();
        // It may have been deleted meanwhile; from here on it can not.
        self.disk(cid)?;
        self.is_told::<DiskRecord>(cid);
        self.store.write_disk_metadata(cid, metadata)
    }

    /// The disk's metadata for a snapshot, which is not refused for want of it.
    pub(super) fn metadata_of(&self, disk: &DiskRecord) -> Map<String, Value> {
        self.store.disk_metadata(disk).unwrap_or_else(|error| {
            tracing::warn!(disk = %disk.cid, error = error.report(), "the disk's metadata is left out");
            Map::new()
        })
    }
}
