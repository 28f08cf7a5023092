//! The records: plain data, one JSON file each.
//!
//! Top-level fields of a newer version survive a rewrite by an older one. A new field below the top
//! level must be harmless to lose, or must raise [`SCHEMA`](super::layout::SCHEMA).

mod disk;
mod network;
mod verified_file;

use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::choice;
use crate::cid::{Cid, DiskCid, SnapshotCid, StemcellCid, VmCid};
use crate::error::Result;
use crate::store::Rank;
use crate::units::{Bytes, MiB};

pub use disk::{Cache, Discard, DiskImage, DiskRecord, Limits, Preallocation, SnapshotRecord};
pub use network::{Keeper, NetworkRecord, Nic, Segment, UserNetwork, VlanLink, Wire};
pub use verified_file::VerifiedFile;

/// A record of an object.
pub trait Record: Serialize + DeserializeOwned {
    /// Type of its cid.
    type Cid: Cid + PartialEq;
    /// Its cid.
    fn cid(&self) -> &Self::Cid;
    /// Rank of its lock.
    const RANK: Rank;
    /// Whether the lock's file is unlinked after every use instead of with the object.
    const LOCK_IS_SHORT: bool = false;
    /// Name of its lock.
    fn lock_name(cid: &Self::Cid) -> String {
        cid.to_string()
    }
    /// Its phase.
    fn phase(&self) -> Phase;
    /// Moves it to another phase.
    fn set_phase(&mut self, phase: Phase);
    /// The pools with files of the object, each in a directory named after its cid.
    fn pools(&self) -> Vec<&str> {
        Vec::new()
    }
}

macro_rules! record {
    ($($name:ident: $cid:ident, lock $rank:ident $(, in $($pool:ident).+ $(and $($other:ident).+)?)?;)*) => {$(
        impl Record for $name {
            type Cid = $cid;

            const RANK: Rank = Rank::$rank;

            fn cid(&self) -> &$cid {
                &self.cid
            }

            fn phase(&self) -> Phase {
                self.phase
            }

            fn set_phase(&mut self, phase: Phase) {
                self.phase = phase;
            }

            $(fn pools(&self) -> Vec<&str> {
                let pools = [&self.$($pool).+ $(, &self.$($other).+)?];
                pools.into_iter().flatten().map(String::as_str).collect()
            })?
        }
    )*};
}

record! {
    StemcellRecord: StemcellCid, lock Stemcell, in pool;
    VmRecord: VmCid, lock Vm, in pool and base.pool;
    SnapshotRecord: SnapshotCid, lock Snapshot, in disk.pool;
}

/// Phase of an object. With a free lock, `Creating` and `Deleting` mean that the object must be
/// removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// A create makes its resources. The Director does not know its cid.
    Creating,
    /// The create has made it.
    Ready,
    /// A delete removes its resources.
    Deleting,
}

/// Power state that calls want for a VM. `exit.json` records that the guest powered itself off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Desired {
    /// On.
    Running,
    /// Off.
    Stopped,
}

choice! {
    /// Format of an image, in QEMU's words.
    pub enum Format ("\"qcow2\" or \"raw\"") {
        /// QEMU's copy-on-write format, version 2 or 3.
        Qcow2 = "qcow2",
        /// The bytes of the disk in order. Holes in the file are zeros.
        Raw = "raw",
    }
}

/// A stemcell: one image, the backing file of VMs' root disks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StemcellRecord {
    /// Version of the layout.
    pub schema: u32,
    /// Its cid.
    pub cid: StemcellCid,
    /// Its phase.
    pub phase: Phase,
    /// Time of its import, UTC.
    pub created_at: String,
    /// Format of the image.
    pub format: Format,
    /// Virtual size of the image, bytes.
    pub virtual_size: Bytes,
    /// Image of a light stemcell, which belongs to the operator; absent: `image.raw` beside this
    /// record or in the pool.
    pub image_path: Option<PathBuf>,
    /// What create_stemcell has verified of a light stemcell's image. Absent in records of older
    /// versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<VerifiedFile>,
    /// Pool of the image; absent: the image is beside this record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// The imported file. Stemcells of the same file share one image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// The cloud properties of the stemcell's manifest.
    pub cloud_properties: Map<String, Value>,
    /// Fields that a newer version added.
    #[serde(flatten)]
    pub newer: Map<String, Value>,
}

/// A file, identified by its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Its SHA-256, hexadecimal.
    pub sha256: String,
    /// Its length, bytes.
    pub size: Bytes,
}

/// A VM: everything that a start of it needs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmRecord {
    /// Version of the layout.
    pub schema: u32,
    /// Its cid.
    pub cid: VmCid,
    /// Its phase.
    pub phase: Phase,
    /// Whether calls want it to run.
    pub desired: Desired,
    /// Number of starts by calls. `exit.json` and events carry the number of their run.
    pub run: u64,
    /// Time of its creation, UTC.
    pub created_at: String,
    /// The Director's id of its agent.
    pub agent_id: String,
    /// The uuid of the Director that created it, if the request had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub director: Option<String>,
    /// Anti-affinity group: the scheduler spreads VMs of one group over the hosts of a Director.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spread: Option<String>,
    /// Its stemcell, which may have been deleted since.
    pub stemcell: StemcellCid,
    /// Its hardware.
    pub machine: Machine,
    /// Uid of its QEMU process.
    pub uid: u32,
    /// Its network cards, in the order of the manifest.
    pub nics: Vec<Nic>,
    /// Pool of its root and ephemeral disks; absent: they are beside this record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Backing file of its root disk: a hard link to the stemcell's image, or a light stemcell's
    /// path.
    pub base: Base,
    /// Size of its root disk, bytes.
    pub root_size: Bytes,
    /// Its ephemeral disk, if it has one.
    pub ephemeral: Option<Ephemeral>,
    /// Its persistent disks, in the order of their attachment.
    pub disks: Vec<Attachment>,
    /// Weight of its share of busy CPUs (cgroup `cpu.weight`), 1 to 10000; absent: 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_weight: Option<u64>,
    /// I/O limits of its root and ephemeral disks together.
    #[serde(default)]
    pub disk_limits: Limits,
    /// Metadata of the last set_vm_metadata.
    #[serde(default)]
    pub metadata: Map<String, Value>,
    /// Fields that a newer version added.
    #[serde(flatten)]
    pub newer: Map<String, Value>,
}

/// A VM's hardware, chosen at its creation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Name of the machine template.
    pub template: String,
    /// SMBIOS and QMP uuid.
    pub uuid: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory, MiB.
    pub ram: MiB,
    /// Its accelerator.
    pub accel: Accel,
    /// CPU model with flags, as `-cpu` takes it.
    pub cpu_model: String,
    /// Number of hot-plug slots for persistent disks.
    pub hotplug_slots: u32,
}

/// The accelerator of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// Hardware virtualization by the kernel.
    Kvm,
    /// Emulation by QEMU.
    Tcg,
}

impl Accel {
    /// QEMU's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// Backing file of a VM's root disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Its path: relative to the VM's directory, or absolute.
    pub path: PathBuf,
    /// Its pool, which is the stemcell's, because a hard link cannot leave its filesystem; absent:
    /// it is beside the VM's record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Its format.
    pub format: Format,
    /// That of a light stemcell's image, copied from the stemcell. Without it, a start does not
    /// check the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<VerifiedFile>,
}

impl Base {
    /// Refuses a light stemcell's image that is not the one create_stemcell has verified.
    ///
    /// # Errors
    /// Those of [`VerifiedFile::ensure_unchanged`].
    pub fn ensure_unchanged(&self) -> Result<()> {
        self.verified.as_ref().map_or(Ok(()), |verified| verified.ensure_unchanged(&self.path))
    }
}

/// An ephemeral disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ephemeral {
    /// Its virtio-blk serial, at most 20 characters.
    pub serial: String,
    /// Its size, MiB.
    pub size: MiB,
}

/// A persistent disk of a VM. Calls ask QEMU for its state instead of trusting the phase.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The disk.
    pub disk: DiskCid,
    /// Its phase.
    pub phase: AttachmentPhase,
}

/// Phase of an attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttachmentPhase {
    /// attach_disk has begun and has not answered.
    Attaching,
    /// attach_disk has answered with the disk hint.
    Attached,
    /// detach_disk has asked the guest to release the disk.
    Detaching,
}

impl VmRecord {
    /// Value of `name` in its metadata: a tag of the deployment, or one that BOSH sets.
    pub fn tag(&self, name: &str) -> Option<&str> {
        self.metadata.get(name).and_then(Value::as_str)
    }

    /// Its name in BOSH (`db/0`), if set_vm_metadata has set it.
    pub fn name(&self) -> Option<&str> {
        self.tag("name")
    }

    /// The attachment of `disk`, if the VM has it.
    pub fn attachment(&self, disk: &DiskCid) -> Option<&Attachment> {
        self.disks.iter().find(|a| a.disk == *disk)
    }

    /// Sets the phase of the attachment of `disk`. Adds the attachment if it is missing.
    pub fn set_attachment(&mut self, disk: &DiskCid, phase: AttachmentPhase) {
        match self.disks.iter_mut().find(|a| a.disk == *disk) {
            Some(attachment) => attachment.phase = phase,
            None => self.disks.push(Attachment { disk: disk.clone(), phase }),
        }
    }

    /// Removes the attachment of `disk`.
    pub fn remove_attachment(&mut self, disk: &DiskCid) {
        self.disks.retain(|a| a.disk != *disk);
    }
}
