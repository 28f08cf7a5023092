//! The records: plain data, one JSON file each. Fields a newer version added survive a rewrite by an older one.

use std::path::PathBuf;

use ipnetwork::IpNetwork;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::choice;
use crate::cid::{Cid, DiskCid, StemcellCid, VmCid};
use crate::link_name::LinkName;
use crate::mac::MacAddress;
use crate::units::{Bytes, MiB};

/// What every record can say of itself.
pub trait Record: Serialize + DeserializeOwned {
    /// What names it.
    type Cid: Cid + PartialEq;
    /// Its name.
    fn cid(&self) -> &Self::Cid;
    /// The layout version it was written with.
    fn schema(&self) -> u32;
    /// Where it is in its life.
    fn phase(&self) -> Phase;
}

macro_rules! record {
    ($($name:ident: $cid:ident),*) => {$(
        impl Record for $name {
            type Cid = $cid;

            fn cid(&self) -> &$cid {
                &self.cid
            }

            fn schema(&self) -> u32 {
                self.schema
            }

            fn phase(&self) -> Phase {
                self.phase
            }
        }
    )*};
}

record!(StemcellRecord: StemcellCid, VmRecord: VmCid, DiskRecord: DiskCid);

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
    /// A light stemcell's image, which is the operator's; a heavy one's is `image.raw` beside this record.
    pub image_path: Option<PathBuf>,
    /// The manifest's cloud properties.
    pub cloud_properties: Map<String, Value>,
    /// Fields of a newer version.
    #[serde(flatten)]
    pub newer: Map<String, Value>,
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
    /// What it was made of. The stemcell may be gone.
    pub stemcell: StemcellCid,
    /// Its hardware.
    pub machine: Machine,
    /// Owner of its QEMU process.
    pub uid: u32,
    /// Its network cards, in manifest order.
    pub nics: Vec<Nic>,
    /// The image its root disk is an overlay of: `base.raw` beside this record, or a light stemcell's path.
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

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// The manifest's name of the network.
    pub network: String,
    /// Its address.
    pub mac: MacAddress,
    /// The tap's name on the host.
    pub tap: LinkName,
    /// What the tap is plugged into.
    pub segment: Segment,
}

/// A bridge and what it takes for VMs on it to be reached. Stored in the VM's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// The network's name in the configuration, for messages and for people who look at the host.
    pub network: String,
    /// The Linux bridge.
    pub bridge: LinkName,
    /// Largest packet, bytes; absent: what the bridge has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Who makes the bridge.
    pub keeper: Keeper,
}

/// Who makes a bridge, and unmakes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keeper {
    /// The operator. It must be there, and nothing of it is ever changed.
    Operator,
    /// We do, with the first VM on it, and remove it with the last.
    Us {
        /// The host's addresses on the bridge, each with its subnet's prefix.
        addresses: Vec<IpNetwork>,
        /// Whether VMs reach the world under the host's own address.
        masquerade: bool,
    },
}

/// The image below a root overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Relative to the VM's directory, or absolute.
    pub path: PathBuf,
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

/// A persistent disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Layout version.
    pub schema: u32,
    /// Its cid, which is its virtio-blk serial.
    pub cid: DiskCid,
    /// Where it is in its life.
    pub phase: Phase,
    /// When it was created, UTC.
    pub created_at: String,
    /// Its size.
    pub size: MiB,
    /// Format of its image, `disk.<format>` beside this record.
    pub format: Format,
    /// The VM that may have it: that VM's record decides. Always written before the VM's.
    pub vm: Option<VmCid>,
    /// The most it may do.
    #[serde(default)]
    pub limits: Limits,
    /// The disk type's cloud properties.
    pub cloud_properties: Map<String, Value>,
    /// What set_disk_metadata said last.
    #[serde(default)]
    pub metadata: Map<String, Value>,
    /// Fields of a newer version.
    #[serde(flatten)]
    pub newer: Map<String, Value>,
}

/// The most a disk may do, reading and writing together; `None`: as much as the host can.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Operations a second.
    pub iops: Option<u64>,
    /// MiB a second.
    pub mbps: Option<u64>,
}

impl DiskRecord {
    /// Name of its image, beside its record.
    pub fn image(&self) -> String {
        format!("disk.{}", self.format.as_str())
    }
}

impl VmRecord {
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
