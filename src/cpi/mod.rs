//! The CPI contract on this host: each method goes to the verb of its BOSH object.
//!
//! ```text
//!   recovery                        rolls back what killed calls have left
//!   vm                              the objects: one folder each,
//!   disk  stemcell  network           one file for each verb
//!   capacity  machine  presence     what fits; a VM's QEMU as disks need it; what is on this host
//!   creation                        the one way in which an object comes to be
//!   properties                      cloud properties
//!   context                         what every verb is given
//!   contract  deadlines  marker     the methods, their time, the mark of an unacknowledged create
//! ```
//!
//! Every verb can be repeated after a crash at any point: it looks at what exists before it acts. A
//! create that fails removes what it has made; a delete first records that it has begun.

pub mod capacity;
pub mod context;
pub mod contract;
pub mod deadlines;
pub mod disk;
pub mod network;
pub mod presence;
pub mod properties;
pub mod stemcell;
pub mod vm;

pub(crate) mod creation;
pub(crate) mod machine;
pub(crate) mod recovery;

mod marker;

use serde_json::{Map, Value};

use self::context::{Context, RemoteCall};
use self::contract::networks::Networks;
use self::contract::{
    CloudProperties, Contract, CreateDisk, CreateStemcell, CreateVm, CreatedNetwork, DiskHint,
    Metadata, VmResources,
};
use self::creation::cancellation;
use crate::cid::{DiskCid, NetworkCid, SnapshotCid, StemcellCid, VmCid};
use crate::error::{Error, ErrorKind, Result};
use crate::image::import::ImageFile;
use crate::units::MiB;

/// The CPI of this host, for one call.
pub struct Cpi(Context);

impl Cpi {
    /// The CPI for the call `cx`.
    pub fn new(cx: Context) -> Self {
        Self(cx)
    }

    /// Creates a disk with the data of a snapshot: the operator's `disk restore`. It may take as
    /// long as snapshot_disk.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`] for an unknown snapshot, [`ErrorKind::NoDiskSpace`].
    pub fn restore_disk(&self, snapshot: &SnapshotCid) -> Result<DiskCid> {
        disk::restore(self.recover_first("snapshot_disk"), snapshot)
    }

    /// Takes a disk in a shared pool from a host that is gone for good: the operator's `disk take`.
    ///
    /// # Errors
    /// [`ErrorKind::DiskNotFound`] if no pool has the disk; [`ErrorKind::Corrupt`] if its owner
    /// file cannot be used.
    pub fn take_disk(&self, disk: &DiskCid) -> Result<()> {
        disk::take(self.for_change()?, disk)
    }

    /// Gives up this host's ownership of a disk in a shared pool, so that another host of its group
    /// can take it.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if the disk is used here or no other host reaches it;
    /// [`ErrorKind::DiskNotFound`].
    pub fn release_disk(&self, disk: &DiskCid) -> Result<()> {
        disk::release(self.for_change()?, disk)
    }

    /// The context of a call that changes an object, if this version may change the state
    /// directory.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if a newer version wrote it, [`ErrorKind::Host`] for a user other
    /// than root.
    fn for_change(&self) -> Result<&Context> {
        self.0.store.is_initialized()?;
        Ok(&self.0)
    }

    /// Recovers what killed calls have left, as before every create, also one with invalid
    /// arguments. Returns the context.
    fn recover_first(&self, method: &str) -> &Context {
        recovery::run(&self.0, self.0.deadline(method));
        &self.0
    }
}

impl Contract for Cpi {
    fn create_stemcell(&self, stemcell: CreateStemcell) -> Result<StemcellCid> {
        let cx = self.recover_first("create_stemcell");
        let properties = &stemcell.cloud_properties.0;
        match &cx.remote {
            None => stemcell::create(cx, &ImageFile::new(&stemcell.image), properties),
            Some(RemoteCall { image: Some(image), .. }) => {
                stemcell::create(cx, &**image, properties)
            }
            Some(RemoteCall { image: None, .. }) => {
                let message = "the CPI on the caller's machine sends no image";
                Err(Error::new(ErrorKind::BadRequest, message))
            }
        }
    }

    fn delete_stemcell(&self, stemcell: &StemcellCid) -> Result<()> {
        let cx = self.for_change()?;
        cancellation::cancel(cx, stemcell)?;
        stemcell::delete(cx, stemcell)
    }

    fn create_vm(&self, vm: CreateVm) -> Result<(VmCid, Networks)> {
        vm::create(self.recover_first("create_vm"), vm)
    }

    fn delete_vm(&self, vm: &VmCid) -> Result<()> {
        let cx = self.for_change()?;
        cancellation::cancel(cx, vm)?;
        vm::delete(cx, vm)
    }

    fn acknowledge(&self) {
        if let Some(marker) = self.0.marker.get() {
            marker.remove();
        }
    }

    fn has_vm(&self, vm: &VmCid) -> Result<bool> {
        vm::exists(&self.0, vm)
    }

    fn reboot_vm(&self, vm: &VmCid) -> Result<()> {
        vm::reboot(self.for_change()?, vm)
    }

    fn set_vm_metadata(&self, vm: &VmCid, metadata: Metadata) -> Result<()> {
        vm::set_metadata(self.for_change()?, vm, metadata)
    }

    fn calculate_vm_cloud_properties(&self, resources: VmResources) -> Result<Map<String, Value>> {
        Ok(vm::calculate(&resources))
    }

    fn create_disk(&self, disk: CreateDisk) -> Result<DiskCid> {
        disk::create(self.recover_first("create_disk"), disk.size, &disk.cloud_properties.0)
    }

    fn delete_disk(&self, disk: &DiskCid) -> Result<()> {
        let cx = self.for_change()?;
        cancellation::cancel(cx, disk)?;
        disk::delete(cx, disk)
    }

    fn has_disk(&self, disk: &DiskCid) -> Result<bool> {
        disk::exists(&self.0, disk)
    }

    fn attach_disk(&self, vm: &VmCid, disk: &DiskCid) -> Result<DiskHint> {
        disk::attach(self.for_change()?, vm, disk)
    }

    fn detach_disk(&self, vm: &VmCid, disk: &DiskCid) -> Result<()> {
        disk::detach(self.for_change()?, vm, disk)
    }

    fn get_disks(&self, vm: &VmCid) -> Result<Vec<DiskCid>> {
        disk::attached_to(&self.0, vm)
    }

    fn set_disk_metadata(&self, disk: &DiskCid, metadata: Metadata) -> Result<()> {
        disk::set_metadata(self.for_change()?, disk, &metadata)
    }

    fn snapshot_disk(&self, disk: &DiskCid, metadata: Metadata) -> Result<SnapshotCid> {
        disk::create_snapshot(self.recover_first("snapshot_disk"), disk, metadata)
    }

    fn delete_snapshot(&self, snapshot: &SnapshotCid) -> Result<()> {
        let cx = self.for_change()?;
        cancellation::cancel(cx, snapshot)?;
        disk::delete_snapshot(cx, snapshot)
    }

    fn resize_disk(&self, disk: &DiskCid, size: MiB) -> Result<()> {
        disk::resize(self.for_change()?, disk, size)
    }

    fn update_disk(
        &self,
        disk: &DiskCid,
        size: MiB,
        cloud_properties: CloudProperties,
    ) -> Result<Option<DiskCid>> {
        disk::update(self.for_change()?, disk, size, &cloud_properties.0).map(|()| None)
    }

    fn create_network(&self, subnet: Map<String, Value>) -> Result<CreatedNetwork> {
        network::create(self.recover_first("create_network"), &subnet)
    }

    fn delete_network(&self, network: &NetworkCid) -> Result<()> {
        let cx = self.for_change()?;
        cancellation::cancel(cx, network)?;
        network::delete(cx, network)
    }
}
