//! The records: plain data, one JSON file each. Fields a newer version added survive a rewrite by an older one, if they
//! are at the top level: what is added below that must be harmless to lose, or raise [`SCHEMA`](super::layout::SCHEMA).

use std::net::Ipv4Addr;
use std::path::PathBuf;

use ipnetwork::{IpNetwork, Ipv4Network};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::nic_rules::NicRules;
use crate::choice;
use crate::cid::{Cid, DiskCid, NetworkCid, SnapshotCid, StemcellCid, VmCid};
use crate::link_name::LinkName;
use crate::mac::MacAddress;
pub use crate::store::disk_options::{Cache, Discard, Preallocation};
use crate::units::{Bytes, MiB};

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

impl Record for DiskRecord {
    type Cid = DiskCid;

    fn cid(&self) -> &DiskCid {
        &self.cid
    }

    fn phase(&self) -> Phase {
        self.phase
    }

    fn pools(&self) -> Vec<&str> {
        let leftover = self.leftover.as_ref().and_then(|leftover| leftover.pool.as_deref());
        self.pool.as_deref().into_iter().chain(leftover).collect()
    }
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

/// A managed network: one that the Director had made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// Layout version.
    pub schema: u32,
    /// Its cid.
    pub cid: NetworkCid,
    /// Where it is in its life.
    pub phase: Phase,
    /// When it was created, UTC.
    pub created_at: String,
    /// The network as the configuration would have it.
    pub settings: Map<String, Value>,
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
    /// The uuid of the Director that had it made, if it said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub director: Option<String>,
    /// What it was made of. The stemcell may be gone.
    pub stemcell: StemcellCid,
    /// Its hardware.
    pub machine: Machine,
    /// Owner of its QEMU process.
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

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// The manifest's name of the network.
    pub network: String,
    /// Its address.
    pub mac: MacAddress,
    /// Its other end.
    #[serde(flatten)]
    pub wire: Wire,
    /// What it may send, and what reaches it. Absent in records of versions that knew no such rules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rules: Option<NicRules>,
}

impl Nic {
    /// The tap and what it is plugged into, if it has one.
    pub fn tap(&self) -> Option<(&LinkName, &Segment)> {
        match &self.wire {
            Wire::Tap { tap, segment } => Some((tap, segment)),
            Wire::User { .. } => None,
        }
    }
}

/// What a network card is wired to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Wire {
    /// A bridge of the host.
    Tap {
        /// The tap's name on the host.
        tap: LinkName,
        /// What the tap is plugged into.
        segment: Segment,
    },
    /// QEMU's own network stack.
    User {
        /// How it is set up.
        user: UserNetwork,
    },
}

/// QEMU's user networking: a router inside the QEMU process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNetwork {
    /// The network's name in the configuration.
    pub network: String,
    /// The router's address, with the subnet's prefix, at most 29.
    pub gateway: Ipv4Network,
    /// The guest's address.
    pub guest: Ipv4Addr,
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
    /// The VLAN that VMs are on, untagged, where the bridge tells VLANs apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// Whether VMs on it are kept from each other.
    #[serde(default, skip_serializing_if = "is_false")]
    pub isolated: bool,
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
        /// Ports of the host itself that VMs may use, by protocol and port. Absent: all, as records of older versions.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        services: Option<Vec<(u8, u16)>>,
        /// Whether the host passes nothing on between the bridge and its other links.
        #[serde(default, skip_serializing_if = "is_false")]
        closed: bool,
        /// The VLAN of another link that the bridge is part of.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        uplink: Option<VlanLink>,
    },
}

/// A VLAN of a link, which has a sub-interface of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VlanLink {
    /// The link that carries tagged packets.
    pub link: LinkName,
    /// The VLAN, 1 to 4094.
    pub vlan: u16,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_false(value: &bool) -> bool {
    !value
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
    /// What a resize_disk makes of it, so that others count it before the image grows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grows_to: Option<MiB>,
    /// Which of its images is in force: 0, or one more with each copy `update_disk` made.
    #[serde(default)]
    pub generation: u16,
    /// Format of its image.
    pub format: Format,
    /// The pool its image is in; absent: beside this record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Who caches its writes.
    #[serde(default)]
    pub cache: Cache,
    /// What becomes of blocks the guest discards.
    #[serde(default)]
    pub discard: Discard,
    /// How much of the image was there at its creation.
    #[serde(default)]
    pub preallocation: Preallocation,
    /// Whether the image is encrypted with LUKS, by the key of this host.
    #[serde(default)]
    pub encrypted: bool,
    /// An image that is not in force, to be removed: a copy that is being made, or what was in force before it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leftover: Option<DiskImage>,
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

/// One image of a disk: all that takes a copy to change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskImage {
    /// See [`DiskRecord::generation`].
    pub generation: u16,
    /// Its format.
    pub format: Format,
    /// The pool it is in; absent: beside the disk's record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// How much of it was there at its creation.
    #[serde(default)]
    pub preallocation: Preallocation,
    /// Whether it is encrypted.
    #[serde(default)]
    pub encrypted: bool,
}

impl DiskImage {
    /// Its file's name: `disk.<format>` for the first.
    pub fn file_name(&self) -> String {
        match self.generation {
            0 => format!("disk.{}", self.format.as_str()),
            n => format!("disk-{n}.{}", self.format.as_str()),
        }
    }

    /// QEMU's name of its node: the cid for the first. So a running QEMU tells which image it works on.
    pub fn node(&self, disk: &DiskCid) -> String {
        match self.generation {
            0 => disk.as_str().to_owned(),
            n => format!("{disk}.{n}"),
        }
    }
}

impl DiskRecord {
    /// The image in force.
    pub fn current(&self) -> DiskImage {
        DiskImage {
            generation: self.generation,
            format: self.format,
            pool: self.pool.clone(),
            preallocation: self.preallocation,
            encrypted: self.encrypted,
        }
    }

    /// The most its image may come to show.
    pub fn promised(&self) -> MiB {
        self.grows_to.map_or(self.size, |more| more.max(self.size))
    }

    /// The same disk with another image in force.
    pub fn with_image(&self, image: &DiskImage) -> Self {
        let DiskImage { generation, format, pool, preallocation, encrypted } = image.clone();
        Self { generation, format, pool, preallocation, encrypted, ..self.clone() }
    }

    /// Puts the leftover in force; what was in force is the leftover now.
    pub fn switch(&mut self) {
        if let Some(image) = &self.leftover {
            *self = Self { leftover: Some(self.current()), ..self.with_image(image) };
        }
    }

    /// Name of its image.
    pub fn image(&self) -> String {
        self.current().file_name()
    }
}

/// A snapshot of a persistent disk: a copy of its whole image.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// Layout version.
    pub schema: u32,
    /// Its cid.
    pub cid: SnapshotCid,
    /// Where it is in its life.
    pub phase: Phase,
    /// When it was begun, UTC. The copy is of that moment, or of one soon after it.
    pub created_at: String,
    /// The disk as it was. The copy is in the same pool, and as encrypted.
    pub disk: DiskRecord,
    /// Format of the copy.
    pub format: Format,
    /// What snapshot_disk said.
    pub metadata: Map<String, Value>,
    /// Fields of a newer version.
    #[serde(flatten)]
    pub newer: Map<String, Value>,
}

impl SnapshotRecord {
    /// The copy.
    pub fn image(&self) -> DiskImage {
        DiskImage { generation: 0, format: self.format, preallocation: Preallocation::Off, ..self.disk.current() }
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
