//! set_vm_metadata, set_disk_metadata: kept in the records, shown by `vm list`; the guest is never touched.

use serde_json::{Map, Value};

use super::Cpi;
use crate::cid::{DiskCid, VmCid};
use crate::error::Result;

impl Cpi {
    pub(super) fn describe_vm(&self, cid: &VmCid, metadata: Map<String, Value>) -> Result<()> {
        let (_lock, mut vm) = self.locked_vm(cid, self.deadline("set_vm_metadata"))?;
        vm.metadata = metadata;
        self.store.write(&vm)
    }

    pub(super) fn describe_disk(&self, cid: &DiskCid, metadata: Map<String, Value>) -> Result<()> {
        let (_lock, mut disk) = self.locked_disk(cid, self.deadline("set_disk_metadata"))?;
        disk.metadata = metadata;
        self.store.write(&disk)
    }
}
