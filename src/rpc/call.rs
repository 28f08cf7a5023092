//! The acting methods of the CPI contract: parses a request into a typed call and runs the call.

use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value};

use crate::cid::{Cid, DiskCid, NetworkCid, SnapshotCid, StemcellCid, VmCid};
use crate::cpi::contract::{
    CloudProperties, Contract, CreateDisk, CreateStemcell, CreateVm, CreatedNetwork, Metadata,
    VmResources,
};
use crate::error::{Error, ErrorKind, Result};
use crate::rpc::arguments::Arguments;
use crate::rpc::request::Request;
use crate::rpc::undo::Undo;
use crate::schema::printable;
use crate::units::MiB;

/// One method of [`Contract`] with its arguments.
#[derive(Debug)]
#[allow(missing_docs, reason = "each is the method of `Contract` with the same name")]
pub enum Call {
    CreateStemcell(CreateStemcell),
    DeleteStemcell(StemcellCid),
    CreateVm(Box<CreateVm>),
    DeleteVm(VmCid),
    HasVm(VmCid),
    RebootVm(VmCid),
    SetVmMetadata(VmCid, Metadata),
    CalculateVmCloudProperties(VmResources),
    CreateDisk(CreateDisk),
    DeleteDisk(DiskCid),
    HasDisk(DiskCid),
    AttachDisk(VmCid, DiskCid),
    DetachDisk(VmCid, DiskCid),
    GetDisks(VmCid),
    SetDiskMetadata(DiskCid, Metadata),
    SnapshotDisk(DiskCid, Metadata),
    DeleteSnapshot(SnapshotCid),
    ResizeDisk(DiskCid, MiB),
    UpdateDisk(DiskCid, MiB, CloudProperties),
    CreateNetwork(Map<String, Value>),
    DeleteNetwork(NetworkCid),
}

/// The outcome of a call that succeeded.
#[derive(Debug)]
pub struct Success {
    /// The response's `result`.
    pub result: Box<RawValue>,
    /// For a create: how to undo it if the response does not reach the caller.
    pub undo: Option<Undo>,
}

impl Call {
    /// Parses method and arguments of `request`.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`] for a wrong argument, [`ErrorKind::NotSupported`] for an API
    /// version that the CPI does not support, and [`ErrorKind::NotImplemented`] for an unknown
    /// method.
    pub fn parse(request: &Request) -> Result<Self> {
        request.check_versions()?;
        let mut arguments = Arguments::of(request);
        let call = Self::read(&request.method, &mut arguments)?;
        arguments.finish()?;
        Ok(call)
    }

    fn read(method: &str, a: &mut Arguments<'_>) -> Result<Self> {
        Ok(match method {
            "create_stemcell" => Self::CreateStemcell(create_stemcell(a)?),
            "delete_stemcell" => Self::DeleteStemcell(a.cid("stemcell_cid")?),
            "create_vm" => Self::CreateVm(Box::new(create_vm(a)?)),
            "delete_vm" => Self::DeleteVm(a.cid("vm_cid")?),
            "has_vm" => Self::HasVm(a.cid("vm_cid")?),
            "reboot_vm" => Self::RebootVm(a.cid("vm_cid")?),
            "set_vm_metadata" => Self::SetVmMetadata(a.cid("vm_cid")?, a.metadata("metadata")?),
            "calculate_vm_cloud_properties" => {
                Self::CalculateVmCloudProperties(a.property("vm_resources")?)
            }
            "create_disk" => Self::CreateDisk(create_disk(a)?),
            "delete_disk" => Self::DeleteDisk(a.cid("disk_cid")?),
            "has_disk" => Self::HasDisk(a.cid("disk_cid")?),
            "attach_disk" => Self::AttachDisk(a.cid("vm_cid")?, a.cid("disk_cid")?),
            "detach_disk" => Self::DetachDisk(a.cid("vm_cid")?, a.cid("disk_cid")?),
            "get_disks" => Self::GetDisks(a.cid("vm_cid")?),
            "set_disk_metadata" => {
                Self::SetDiskMetadata(a.cid("disk_cid")?, a.metadata("metadata")?)
            }
            "snapshot_disk" => Self::SnapshotDisk(a.cid("disk_cid")?, a.metadata("metadata")?),
            "delete_snapshot" => Self::DeleteSnapshot(a.cid("snapshot_cid")?),
            "resize_disk" => Self::ResizeDisk(a.cid("disk_cid")?, a.property("new_size")?),
            "update_disk" => {
                Self::UpdateDisk(a.cid("disk_cid")?, a.property("new_size")?, cloud_properties(a)?)
            }
            "create_network" => Self::CreateNetwork(a.property("subnet")?),
            "delete_network" => Self::DeleteNetwork(a.cid("network_cid")?),
            "configure_networks" | "current_vm_id" | "ping" => {
                return Err(not_implemented(format!("no supported Director calls '{method}'")));
            }
            unknown => {
                return Err(not_implemented(format!("unknown method '{}'", printable(unknown))));
            }
        })
    }

    /// Chooses the cid of the object that the call creates, and returns the delete that undoes the
    /// create; `None` if the call creates nothing. With `host`, the name of one of several hosts,
    /// the cid has a tag that tells the host.
    pub fn choose_cid(&self, host: Option<&str>) -> Option<Undo> {
        fn new<C: Cid>(host: Option<&str>) -> C {
            host.map_or_else(C::random, C::random_on_host)
        }
        Some(match self {
            Self::CreateStemcell(_) => Undo::DeleteStemcell(new(host)),
            Self::CreateVm(_) => Undo::DeleteVm(new(host)),
            Self::CreateDisk(_) => Undo::DeleteDisk(new(host)),
            Self::SnapshotDisk(..) => Undo::DeleteSnapshot(new(host)),
            Self::CreateNetwork(_) => Undo::DeleteNetwork(new(host)),
            _ => return None,
        })
    }

    /// The cid of the object that the call is about: of the VM if it names a VM and a disk. `None`
    /// for a create.
    pub fn object(&self) -> Option<&str> {
        Some(match self {
            Self::DeleteStemcell(stemcell) => stemcell.as_str(),
            Self::DeleteVm(vm)
            | Self::HasVm(vm)
            | Self::RebootVm(vm)
            | Self::SetVmMetadata(vm, _)
            | Self::AttachDisk(vm, _)
            | Self::DetachDisk(vm, _)
            | Self::GetDisks(vm) => vm.as_str(),
            Self::DeleteDisk(disk)
            | Self::HasDisk(disk)
            | Self::SetDiskMetadata(disk, _)
            | Self::SnapshotDisk(disk, _)
            | Self::ResizeDisk(disk, _)
            | Self::UpdateDisk(disk, ..) => disk.as_str(),
            Self::DeleteSnapshot(snapshot) => snapshot.as_str(),
            Self::DeleteNetwork(network) => network.as_str(),
            Self::CreateStemcell(_)
            | Self::CreateVm(_)
            | Self::CreateDisk(_)
            | Self::CreateNetwork(_)
            | Self::CalculateVmCloudProperties(_) => return None,
        })
    }

    /// Calls the method of `verbs`.
    ///
    /// # Errors
    /// Those of the method.
    pub fn run(self, verbs: &dyn Contract) -> Result<Success> {
        match self {
            Self::CreateStemcell(stemcell) => {
                created(verbs.create_stemcell(stemcell)?, Undo::DeleteStemcell)
            }
            Self::DeleteStemcell(stemcell) => done(verbs.delete_stemcell(&stemcell)),
            Self::CreateVm(vm) => {
                let (cid, networks) = verbs.create_vm(*vm)?;
                // An array: from a plain string the Director would take the first character as the
                // cid.
                Ok(Success {
                    undo: Some(Undo::DeleteVm(cid.clone())),
                    ..answered(&(cid, networks))
                })
            }
            Self::DeleteVm(vm) => done(verbs.delete_vm(&vm)),
            Self::HasVm(vm) => verbs.has_vm(&vm).map(|has| answered(&has)),
            Self::RebootVm(vm) => done(verbs.reboot_vm(&vm)),
            Self::SetVmMetadata(vm, metadata) => done(verbs.set_vm_metadata(&vm, metadata)),
            Self::CalculateVmCloudProperties(resources) => verbs
                .calculate_vm_cloud_properties(resources)
                .map(|properties| answered(&properties)),
            Self::CreateDisk(disk) => created(verbs.create_disk(disk)?, Undo::DeleteDisk),
            Self::DeleteDisk(disk) => done(verbs.delete_disk(&disk)),
            Self::HasDisk(disk) => verbs.has_disk(&disk).map(|has| answered(&has)),
            Self::AttachDisk(vm, disk) => verbs.attach_disk(&vm, &disk).map(|hint| answered(&hint)),
            Self::DetachDisk(vm, disk) => done(verbs.detach_disk(&vm, &disk)),
            Self::GetDisks(vm) => verbs.get_disks(&vm).map(|disks| answered(&disks)),
            Self::SetDiskMetadata(disk, metadata) => done(verbs.set_disk_metadata(&disk, metadata)),
            Self::SnapshotDisk(disk, metadata) => {
                created(verbs.snapshot_disk(&disk, metadata)?, Undo::DeleteSnapshot)
            }
            Self::DeleteSnapshot(snapshot) => done(verbs.delete_snapshot(&snapshot)),
            Self::ResizeDisk(disk, size) => done(verbs.resize_disk(&disk, size)),
            Self::UpdateDisk(disk, size, properties) => {
                verbs.update_disk(&disk, size, properties).map(|new| answered(&new))
            }
            Self::CreateNetwork(subnet) => {
                let CreatedNetwork { cid, addresses, cloud_properties } =
                    verbs.create_network(subnet)?;
                let undo = Some(Undo::DeleteNetwork(cid.clone()));
                Ok(Success { undo, ..answered(&(cid, addresses, cloud_properties)) })
            }
            Self::DeleteNetwork(network) => done(verbs.delete_network(&network)),
        }
    }
}

fn create_stemcell(a: &mut Arguments<'_>) -> Result<CreateStemcell> {
    let (image, cloud_properties) = (a.property("image_path")?, cloud_properties(a)?);
    // API version 3 adds an object. The only key it defines is `tags`.
    let extra: Option<Map<String, Value>> = a.optional("extra")?;
    let tags = match extra.and_then(|mut extra| extra.remove("tags")) {
        Some(Value::Object(tags)) => tags,
        _ => Map::new(),
    };
    Ok(CreateStemcell { image, cloud_properties, tags })
}

fn create_vm(a: &mut Arguments<'_>) -> Result<CreateVm> {
    Ok(CreateVm {
        agent_id: a.agent_id("agent_id")?,
        stemcell: a.cid("stemcell_cid")?,
        cloud_properties: cloud_properties(a)?,
        networks: a.networks("networks")?,
        disks: a.cids("disk_cids")?,
        env: a.env("env")?,
    })
}

fn create_disk(a: &mut Arguments<'_>) -> Result<CreateDisk> {
    Ok(CreateDisk {
        size: a.property("size")?,
        cloud_properties: cloud_properties(a)?,
        vm: a.optional_cid("vm_cid")?,
    })
}

/// Reads cloud properties: null if the manifest has none.
fn cloud_properties(a: &mut Arguments<'_>) -> Result<CloudProperties> {
    a.optional("cloud_properties").map(Option::unwrap_or_default)
}

fn answered(result: &impl Serialize) -> Success {
    // Results are cids, booleans and maps with string keys, which always serialize.
    Success { result: to_raw_value(result).expect("a result is JSON"), undo: None }
}

fn created<T: Serialize + Clone>(cid: T, undo: impl FnOnce(T) -> Undo) -> Result<Success> {
    Ok(Success { undo: Some(undo(cid.clone())), ..answered(&cid) })
}

fn done(outcome: Result<()>) -> Result<Success> {
    outcome.map(|()| answered(&()))
}

fn not_implemented(message: String) -> Error {
    Error::new(ErrorKind::NotImplemented, message)
}

#[cfg(test)]
mod tests;
