//! A CPI for tests that does nothing and records its calls.

use std::cell::RefCell;
use std::rc::Rc;

use serde_json::{Map, Value, json};

use crate::cid::{Cid, DiskCid, StemcellCid, VmCid};
use crate::cpi::contract::networks::Networks;
use crate::cpi::contract::{
    Contract, CreateDisk, CreateStemcell, CreateVm, DiskHint, Metadata, VmResources,
};
use crate::error::Result;

/// The calls that a [`Fake`] received, in order.
#[derive(Clone, Default)]
pub struct Calls(Rc<RefCell<Vec<String>>>);

impl Calls {
    pub fn take(&self) -> Vec<String> {
        self.0.take()
    }

    fn push(&self, call: String) {
        self.0.borrow_mut().push(call);
    }
}

pub struct Fake(Calls);

impl Fake {
    pub fn new(calls: Calls) -> Self {
        Self(calls)
    }
}

fn new<T: Cid>() -> T {
    T::parse(&format!("{}-new", T::PREFIX)).expect("a cid")
}

impl Contract for Fake {
    fn create_stemcell(&self, stemcell: CreateStemcell) -> Result<StemcellCid> {
        let tags =
            if stemcell.tags.is_empty() { String::new() } else { format!(" {:?}", stemcell.tags) };
        self.0.push(format!("create_stemcell {}{tags}", stemcell.image.display()));
        Ok(new())
    }

    fn delete_stemcell(&self, stemcell: &StemcellCid) -> Result<()> {
        self.0.push(format!("delete_stemcell {stemcell}"));
        Ok(())
    }

    fn create_vm(&self, vm: CreateVm) -> Result<(VmCid, Networks)> {
        self.0.push(format!("create_vm {}", vm.agent_id));
        Ok((new(), vm.networks))
    }

    fn delete_vm(&self, vm: &VmCid) -> Result<()> {
        self.0.push(format!("delete_vm {vm}"));
        Ok(())
    }

    fn has_vm(&self, vm: &VmCid) -> Result<bool> {
        self.0.push(format!("has_vm {vm}"));
        Ok(true)
    }

    fn reboot_vm(&self, vm: &VmCid) -> Result<()> {
        self.0.push(format!("reboot_vm {vm}"));
        Ok(())
    }

    fn set_vm_metadata(&self, vm: &VmCid, metadata: Metadata) -> Result<()> {
        self.0.push(format!("set_vm_metadata {vm} {}", Value::Object(metadata)));
        Ok(())
    }

    fn calculate_vm_cloud_properties(&self, resources: VmResources) -> Result<Map<String, Value>> {
        self.0.push(format!("calculate_vm_cloud_properties {}", resources.ram));
        Ok(Map::from_iter([("cpu".to_owned(), json!(resources.cpu.get()))]))
    }

    fn create_disk(&self, disk: CreateDisk) -> Result<DiskCid> {
        let near = disk.vm.map(|vm| format!(" near {vm}")).unwrap_or_default();
        self.0.push(format!("create_disk {}{near}", disk.size));
        Ok(new())
    }

    fn delete_disk(&self, disk: &DiskCid) -> Result<()> {
        self.0.push(format!("delete_disk {disk}"));
        Ok(())
    }

    fn has_disk(&self, disk: &DiskCid) -> Result<bool> {
        self.0.push(format!("has_disk {disk}"));
        Ok(false)
    }

    fn attach_disk(&self, vm: &VmCid, disk: &DiskCid) -> Result<DiskHint> {
        self.0.push(format!("attach_disk {vm} {disk}"));
        Ok(DiskHint { path: format!("/dev/disk/by-id/virtio-{disk}") })
    }

    fn detach_disk(&self, vm: &VmCid, disk: &DiskCid) -> Result<()> {
        self.0.push(format!("detach_disk {vm} {disk}"));
        Ok(())
    }

    fn get_disks(&self, vm: &VmCid) -> Result<Vec<DiskCid>> {
        self.0.push(format!("get_disks {vm}"));
        Ok(vec![new()])
    }

    fn set_disk_metadata(&self, disk: &DiskCid, metadata: Metadata) -> Result<()> {
        self.0.push(format!("set_disk_metadata {disk} {}", Value::Object(metadata)));
        Ok(())
    }
}
