//! The verbs: find, lock, act, record. One file per family.
//!
//! Every verb can be repeated after a crash at any point: it looks at what is there before it acts. A create that fails
//! removes what it made; a delete begins by writing down that it began.

mod addresses;
mod attachments;
pub mod audit;
mod calculate;
mod called_off;
pub mod cloud_properties;
mod copies;
mod disk_locks;
mod disks;
mod encryption;
pub mod every_vm;
mod forgotten;
mod handover;
pub mod host_networks;
mod leftovers;
mod managed_networks;
mod metadata;
pub mod networks;
pub mod offer;
mod placement;
mod power;
mod resize;
mod snapshots;
pub mod space;
pub mod stemcells;
mod update;
pub mod verbs;
mod vms;

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use self::forgotten::Untold;
use self::networks::Networks;
use self::verbs::{
    CloudProperties, CreateDisk, CreateStemcell, CreateVm, CreatedNetwork, DiskHint, Metadata,
    Verbs, VmResources,
};
use crate::cid::{Cid, DiskCid, NetworkCid, SnapshotCid, StemcellCid, VmCid};
use crate::config::Config;
use crate::error::{Error, ErrorKind, Result};
use crate::image::import::{ImageFile, ImageSource};
use crate::store::{DiskRecord, Guard, Phase, Rank, Record, Store, VmRecord};
use crate::supervisor::{self, Scope};
use crate::units::MiB;

/// The CPI of this host, for one call.
pub struct Cpi {
    config: Config,
    config_file: Option<PathBuf>,
    store: Store,
    /// The uuid of whose call this is.
    director: Option<String>,
    /// What comes with a call from another machine.
    afar: Option<Afar>,
    /// That its caller was not told yet of what it made.
    untold: OnceLock<Untold>,
    began: Instant,
}

/// What a caller on another machine hands over beside its request.
#[derive(Default)]
pub struct Afar {
    /// The cid that what is created shall have.
    pub cid: Option<String>,
    /// How many VMs that had better not be with a new one may be here for it.
    pub alike: Option<usize>,
    /// Whether other hosts make the same under the same cid.
    pub everywhere: bool,
    /// Whether the call undoes a create that may not have begun yet.
    pub undoes: bool,
    /// The image that create_stemcell shall import: the path in its request is on the caller's machine.
    pub image: Option<Box<dyn ImageSource>>,
}

impl Cpi {
    /// The CPI under `config`, which was read from `config_file`. The clock of the call's deadline starts here.
    pub fn new(config: Config, config_file: Option<PathBuf>) -> Self {
        let store = Store::from_config(&config);
        Self {
            config,
            config_file,
            store,
            director: None,
            afar: None,
            untold: OnceLock::new(),
            began: Instant::now(),
        }
    }

    /// The same for a call of the Director with this uuid.
    pub fn called_by(self, director: Option<&str>) -> Self {
        Self { director: director.map(str::to_owned), ..self }
    }

    /// The same for a caller on another machine, who can not name files of this one.
    pub fn from_afar(self, afar: Afar) -> Self {
        Self { afar: Some(afar), ..self }
    }

    /// The cid of what this call creates.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`] for one that a caller chose and we would not.
    fn new_cid<R: Record>(&self) -> Result<R::Cid> {
        let Some(chosen) = self.afar.as_ref().and_then(|afar| afar.cid.as_deref()) else {
            return Ok(R::Cid::random());
        };
        R::Cid::parse_generated(chosen)
            .map_err(|e| Error::new(ErrorKind::BadRequest, "the new cid").because(e))
    }

    /// Undoes a create that failed, whose lock is `lock`: what is said is why it failed, and what is left if that can not be
    /// undone now.
    fn undone<R: Record>(&self, cid: &R::Cid, lock: Guard, failed: Error) -> Error {
        let undone = self
            .store
            .remove::<R>(cid)
            .and_then(|()| lock.unlink())
            .and_then(|()| self.settled(cid));
        match undone {
            Ok(()) => failed,
            Err(error) => error.during(format!("remove what was made before: {}", failed.report())),
        }
    }

    /// When the call of `method` must have ended.
    fn deadline(&self, method: &str) -> Instant {
        self.began + self.config.deadline(method, default_deadline(method))
    }

    fn scope(&self, cid: &VmCid) -> Scope {
        Scope::new(self.config.clone(), cid.clone())
    }

    /// The record of a VM that exists, whatever its power state.
    fn vm(&self, cid: &VmCid) -> Result<VmRecord> {
        let record = self.store.find::<VmRecord>(cid)?.filter(|vm| vm.phase == Phase::Ready);
        record.ok_or_else(|| Error::new(ErrorKind::VmNotFound, format!("there is no VM '{cid}'")))
    }

    /// Takes the lock of a VM that exists. Whoever waited for one that was deleted meanwhile leaves no lock behind. A VM
    /// that lost its supervisor gets one.
    fn locked_vm(&self, cid: &VmCid, deadline: Instant) -> Result<(Guard, VmRecord)> {
        self.vm(cid)?;
        let lock = self.store.lock(Rank::Vm, cid, deadline)?;
        let vm = match self.vm(cid) {
            Ok(vm) => vm,
            Err(error) => return lock.unlink().and(Err(error)),
        };
        self.is_told::<VmRecord>(cid);
        let adopted =
            supervisor::adopt(&self.scope(cid), self.config_file.as_deref(), &lock, deadline);
        if let Err(error) = adopted {
            tracing::warn!(vm = %cid, error = error.report(), "the VM has no supervisor and can not be given one");
        }
        Ok((lock, vm))
    }

    /// The record of a disk that exists.
    fn disk(&self, cid: &DiskCid) -> Result<DiskRecord> {
        let record = self.store.find::<DiskRecord>(cid)?.filter(|disk| disk.phase == Phase::Ready);
        record
            .ok_or_else(|| Error::new(ErrorKind::DiskNotFound, format!("there is no disk '{cid}'")))
    }
}

/// How long a method may take unless the operator decided. `docs/operating.md` lists these.
pub fn default_deadline(method: &str) -> Duration {
    Duration::from_secs(match method {
        "snapshot_disk" | "update_disk" => 3600,
        "create_stemcell" => 1800,
        "create_vm" | "reboot_vm" | "detach_disk" => 300,
        "attach_disk" | "delete_vm" | "create_disk" | "resize_disk" => 120,
        _ => 60,
    })
}

impl Verbs for Cpi {
    fn create_stemcell(&self, stemcell: CreateStemcell) -> Result<StemcellCid> {
        match &self.afar {
            None => {
                self.import_stemcell(&ImageFile::new(&stemcell.image), &stemcell.cloud_properties.0)
            }
            Some(Afar { image: Some(image), .. }) => {
                self.import_stemcell(&**image, &stemcell.cloud_properties.0)
            }
            Some(Afar { image: None, .. }) => Err(Error::new(
                ErrorKind::BadRequest,
                "the caller, on another machine, sends no image",
            )),
        }
    }

    fn delete_stemcell(&self, stemcell: &StemcellCid) -> Result<()> {
        self.call_off(stemcell)?;
        self.remove_stemcell(stemcell)
    }

    fn create_vm(&self, vm: CreateVm) -> Result<(VmCid, Networks)> {
        self.make_vm(vm)
    }

    fn delete_vm(&self, vm: &VmCid) -> Result<()> {
        self.call_off(vm)?;
        self.remove_vm(vm)
    }

    fn told(&self) {
        if let Some(untold) = self.untold.get() {
            untold.is_told();
        }
    }

    fn has_vm(&self, vm: &VmCid) -> Result<bool> {
        self.vm_exists(vm)
    }

    fn reboot_vm(&self, vm: &VmCid) -> Result<()> {
        self.power_cycle(vm)
    }

    fn set_vm_metadata(&self, vm: &VmCid, metadata: Metadata) -> Result<()> {
        self.describe_vm(vm, metadata)
    }

    fn calculate_vm_cloud_properties(&self, resources: VmResources) -> Result<Map<String, Value>> {
        Ok(calculate::cloud_properties(&resources))
    }

    fn create_disk(&self, disk: CreateDisk) -> Result<DiskCid> {
        self.make_disk(disk.size, &disk.cloud_properties.0)
    }

    fn delete_disk(&self, disk: &DiskCid) -> Result<()> {
        self.call_off(disk)?;
        self.remove_disk(disk)
    }

    fn has_disk(&self, disk: &DiskCid) -> Result<bool> {
        self.disk_exists(disk)
    }

    fn attach_disk(&self, vm: &VmCid, disk: &DiskCid) -> Result<DiskHint> {
        self.attach(vm, disk).map(|path| DiskHint { path })
    }

    fn detach_disk(&self, vm: &VmCid, disk: &DiskCid) -> Result<()> {
        self.detach(vm, disk)
    }

    fn get_disks(&self, vm: &VmCid) -> Result<Vec<DiskCid>> {
        self.attached_disks(vm)
    }

    fn set_disk_metadata(&self, disk: &DiskCid, metadata: Metadata) -> Result<()> {
        self.describe_disk(disk, &metadata)
    }

    fn snapshot_disk(&self, disk: &DiskCid, metadata: Metadata) -> Result<SnapshotCid> {
        self.make_snapshot(disk, metadata)
    }

    fn delete_snapshot(&self, snapshot: &SnapshotCid) -> Result<()> {
        self.call_off(snapshot)?;
        self.remove_snapshot(snapshot)
    }

    fn resize_disk(&self, disk: &DiskCid, size: MiB) -> Result<()> {
        self.grow_disk(disk, size)
    }

    fn update_disk(
        &self,
        disk: &DiskCid,
        size: MiB,
        cloud_properties: CloudProperties,
    ) -> Result<Option<DiskCid>> {
        self.change_disk(disk, size, &cloud_properties.0).map(|()| None)
    }

    fn create_network(&self, subnet: Map<String, Value>) -> Result<CreatedNetwork> {
        self.make_managed(&subnet)
    }

    fn delete_network(&self, network: &NetworkCid) -> Result<()> {
        self.call_off(network)?;
        self.remove_managed(network)
    }
}
