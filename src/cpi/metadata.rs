//! set_vm_metadata, set_disk_metadata: kept in the records, shown by `vm list`; the guest is never touched.

use serde_json::{Map, Value};

use super::Cpi;
use crate::cid::{DiskCid, VmCid};
use crate::error::Result;
use crate::store::Rank;

impl Cpi {
    pub(super) fn describe_vm(&self, cid: &VmCid, metadata: Map<String, Value>) -> Result<()> {
        self.vm(cid)?;
        let _lock = self.store.lock(Rank::Vm, cid, self.deadline("set_vm_metadata"))?;
        let mut vm = self.vm(cid)?;
        vm.metadata = metadata;
        self.store.write(&vm)
    }

    pub(super) fn describe_disk(&self, cid: &DiskCid, metadata: Map<String, Value>) -> Result<()> {
        self.disk(cid)?;
        let _lock = self.store.lock(Rank::Disk, cid, self.deadline("set_disk_metadata"))?;
        let mut disk = self.disk(cid)?;
        disk.metadata = metadata;
        self.store.write(&disk)
    }
}
