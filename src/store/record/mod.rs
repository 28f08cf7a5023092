//! The records: plain data, one JSON file each. Fields a newer version added survive a rewrite by an older one, if they
//! are at the top level: what is added below that must be harmless to lose, or raise [`SCHEMA`](super::layout::SCHEMA).

mod disk;
mod network;

use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::choice;
use crate::cid::{Cid, DiskCid, NetworkCid, SnapshotCid, StemcellCid, VmCid};
use crate::units::{Bytes, MiB};

pub use disk::{Cache, Discard, DiskImage, DiskRecord, Limits, Preallocation, SnapshotRecord};
pub use network::{Keeper, NetworkRecord, Nic, Segment, UserNetwork, VlanLink, Wire};

/// What every record can say of itself.
pub trait Record: Serialize + DeserializeOwned {
    /// What names it.
    type Cid: Cid + PartialEq;
    /// Its name.
    fn cid(&self) -> &Self::Cid;
    /// Where it is in its life.
    fn phase(&self) -> Phase;
    /// The pools that have files of it, in a directory named after it.
    fn pools(&self) -> Vec<&str> {
        Vec::new()
    }
}

macro_rules! record {
    ($($name:ident: $cid:ident $(, in $($pool:ident).+ $(and $($other:ident).+)?)?;)*) => {$(
        impl Record for $name {
            type Cid = $cid;

            fn cid(&self) -> &$cid {
                &self.cid
            }

            fn phase(&self) -> Phase {
                self.phase
            }

            $(fn pools(&self) -> Vec<&str> {
                [&self.$($pool).+ $(, &self.$($other).+)?].into_iter().flatten().map(String::as_str).collect()
            })?
        }
    )*};
}

record! {
    StemcellRecord: StemcellCid, in pool;
    VmRecord: VmCid, in pool and base.pool;
    SnapshotRecord: SnapshotCid, in disk.pool;
    NetworkRecord: NetworkCid;
}

/// Where an object is in its life. `Creating` and `Deleting` with a free lock mean: remove what is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Its resources are being made; nobody has been told its cid.
    Creating,
    /// Its cid was answered.
    Ready,
    /// Its resources are being removed.
    Deleting,
}

/// Whether a VM should run, as far as calls decided. That the guest powered itself off is in `exit.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Desired {
    /// On.
    Running,
    /// Off.
    Stopped,
}

choice! {
    /// How the bytes of an image are laid out, in QEMU's words.
    pub enum Format ("\"qcow2\" or \"raw\"") {
        /// QEMU's copy-on-write format, version 2 or 3.
        Qcow2 = "qcow2",
        /// The disk's bytes, one after the other; holes are zeros.
        Raw = "raw",
    }
}

/// A stemcell: one image that VMs are overlays of.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StemcellRecord {
    /// Layout version.
    pub schema: u32,
    /// Its cid.
    pub cid: StemcellCid,
    /// Where it is in its life.
    pub phase: Phase,
    /// When it was imported, UTC.
    pub created_at: String,
    /// Format of the image.
    pub format: Format,
    /// What the guest sees as the disk's size.
    pub virtual_size: Bytes,
    /// A light stemcell's image, which is the operator's; a heavy one's is `image.raw` beside this record or in its pool.
    pub image_path: Option<PathBuf>,
    /// The pool its image is in; absent: beside this record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// The file it was imported from. Another stemcell of the same file shares the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// The manifest's cloud properties.
    pub cloud_properties: Map<String, Value>,
    /// Fields of a newer version.
    #[serde(flatten)]
    pub newer: Map<String, Value>,
}

/// A file by its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Its SHA-256, hexadecimal.
    pub sha256: String,
    /// Its length.
    pub size: Bytes,
}

/// A VM: all that is needed to start it again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmRecord {
    /// Layout version.
    pub schema: u32,
    /// Its cid.
    pub cid: VmCid,
    /// Where it is in its life.
    pub phase: Phase,
    /// Whether it should run.
    pub desired: Desired,
    /// Counts the starts ordered by calls: `exit.json` and events name the run they are about.
    pub run: u64,
    /// When it was created, UTC.
    pub created_at: String,
    /// The Director's name of the agent in it.
    pub agent_id: String,
    /// The uuid of the Director that had it made, if it said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub director: Option<String>,
    /// VMs with the same word had better be on different hosts, where a Director has several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spread: Option<String>,
    /// What it was made of. The stemcell may be gone.
    pub stemcell: StemcellCid,
    /// Its hardware.
    pub machine: Machine,
    /// StateDirId of its QEMU process.
    pub uid: u32,
    /// Its network cards, in manifest order.
    pub nics: Vec<Nic>,
    /// The pool its root and ephemeral disks are in; absent: beside this record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// The image its root disk is an overlay of: a link to the stemcell's, or a light stemcell's path.
    pub base: Base,
    /// Root disk's size.
    pub root_size: Bytes,
    /// Ephemeral disk, if it has one.
    pub ephemeral: Option<Ephemeral>,
    /// Persistent disks attached to it, in the order of attaching.
    pub disks: Vec<Attachment>,
    /// Its share of the CPUs when all are busy, 1 to 10000; absent: 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_weight: Option<u64>,
    /// The most its root and ephemeral disks may do together.
    #[serde(default)]
    pub disk_limits: Limits,
    /// What set_vm_metadata said last.
    #[serde(default)]
    pub metadata: Map<String, Value>,
    /// Fields of a newer version.
    #[serde(flatten)]
    pub newer: Map<String, Value>,
}

/// A VM's hardware, decided once at creation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Name of the machine template.
    pub template: String,
    /// SMBIOS and QMP uuid.
    pub uuid: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory.
    pub ram: MiB,
    /// What it runs under.
    pub accel: Accel,
    /// CPU model with flags, as `-cpu` takes it.
    pub cpu_model: String,
    /// Empty slots for persistent disks.
    pub hotplug_slots: u32,
}

/// An accelerator that was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// Hardware virtualization.
    Kvm,
    /// Emulation.
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

/// The image below a root overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Relative to the VM's directory, or absolute.
    pub path: PathBuf,
    /// The pool it is in, the stemcell's: a link can not leave its filesystem. Absent: beside the VM's record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Its format.
    pub format: Format,
}

/// An ephemeral disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ephemeral {
    /// virtio-blk serial, at most 20 characters.
    pub serial: String,
    /// Its size.
    pub size: MiB,
}

/// A persistent disk on a VM. Settled by asking QEMU, not by trusting the phase.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The disk.
    pub disk: DiskCid,
    /// How far it got.
    pub phase: AttachmentPhase,
}

/// How far an attachment got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttachmentPhase {
    /// Ordered; the hint was not answered yet.
    Attaching,
    /// The hint was answered.
    Attached,
    /// The guest was asked to let go.
    Detaching,
}

impl VmRecord {
    /// What set_vm_metadata said of it under `name`: a tag of the deployment's, or one of BOSH's own.
    pub fn tag(&self, name: &str) -> Option<&str> {
        self.metadata.get(name).and_then(Value::as_str)
    }

    /// BOSH's name of it (`db/0`), if set_vm_metadata told it.
    pub fn name(&self) -> Option<&str> {
        self.tag("name")
    }

    /// The attachment of `disk`, if it has one.
    pub fn attachment(&self, disk: &DiskCid) -> Option<&Attachment> {
        self.disks.iter().find(|a| a.disk == *disk)
    }

    /// Sets how far the attachment of `disk` got, adding it if need be.
    pub fn set_attachment(&mut self, disk: &DiskCid, phase: AttachmentPhase) {
        match self.disks.iter_mut().find(|a| a.disk == *disk) {
            Some(attachment) => attachment.phase = phase,
            None => self.disks.push(Attachment { disk: disk.clone(), phase }),
        }
    }

    /// Forgets the attachment of `disk`.
    pub fn forget_attachment(&mut self, disk: &DiskCid) {
        self.disks.retain(|a| a.disk != *disk);
    }
}
