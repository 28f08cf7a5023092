//! Records of persistent disks and snapshots.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Format, Phase, Record};
use crate::cid::{Cid, DiskCid, SnapshotCid, VmCid};
use crate::store::Rank;
pub use crate::store::disk_options::{Cache, Discard, Preallocation};
use crate::units::MiB;

/// A persistent disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Version of the layout.
    pub schema: u32,
    /// Its cid, which is also its virtio-blk serial.
    pub cid: DiskCid,
    /// Its phase.
    pub phase: Phase,
    /// Time of its creation, UTC.
    pub created_at: String,
    /// Its size, MiB.
    pub size: MiB,
    /// New size while a resize_disk is in progress, MiB. Admission counts it before the image
    /// grows.
    #[serde(rename = "grows_to", default, skip_serializing_if = "Option::is_none")]
    pub resize_target: Option<MiB>,
    /// Number of its current image: 0, plus 1 for each copy by update_disk.
    #[serde(default)]
    pub generation: u16,
    /// Format of its current image.
    pub format: Format,
    /// Pool of the current image; absent: the image is beside this record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// QEMU's cache mode.
    #[serde(default)]
    pub cache: Cache,
    /// QEMU's handling of blocks that the guest discards.
    #[serde(default)]
    pub discard: Discard,
    /// Preallocation of the current image at its creation.
    #[serde(default)]
    pub preallocation: Preallocation,
    /// Whether the current image is encrypted (LUKS) with the key of this host.
    #[serde(default)]
    pub encrypted: bool,
    /// The disk's other image, to be removed: an unfinished copy, or the previous image after the
    /// switch to a copy.
    #[serde(rename = "leftover", default, skip_serializing_if = "Option::is_none")]
    pub inactive_image: Option<DiskImage>,
    /// The VM that may have the disk attached. The VM's record, which is written later, decides.
    pub vm: Option<VmCid>,
    /// Its I/O limits.
    #[serde(default)]
    pub limits: Limits,
    /// The cloud properties of its disk type.
    pub cloud_properties: Map<String, Value>,
    /// Metadata as old versions recorded it: see [`crate::store::Store::disk_metadata`].
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub metadata: Map<String, Value>,
    /// Fields that a newer version added.
    #[serde(flatten)]
    pub newer: Map<String, Value>,
}

/// I/O limits of a disk, reads and writes together; `None`: unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// I/O operations per second.
    pub iops: Option<u64>,
    /// MiB per second.
    pub mbps: Option<u64>,
}

/// One image of a disk: the properties that only a copy can change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskImage {
    /// See [`DiskRecord::generation`].
    pub generation: u16,
    /// Its format.
    pub format: Format,
    /// Its pool; absent: it is beside the disk's record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Its preallocation at its creation.
    #[serde(default)]
    pub preallocation: Preallocation,
    /// Whether it is encrypted.
    #[serde(default)]
    pub encrypted: bool,
}

impl DiskImage {
    /// Name of its file: `disk.<format>`, later `disk-<generation>.<format>`.
    pub fn file_name(&self) -> String {
        match self.generation {
            0 => format!("disk.{}", self.format.as_str()),
            n => format!("disk-{n}.{}", self.format.as_str()),
        }
    }

    /// Name of its block node in QEMU: the cid, later `<cid>.<generation>`. So a running QEMU
    /// reports which image it uses.
    pub fn node(&self, disk: &DiskCid) -> String {
        match self.generation {
            0 => disk.as_str().to_owned(),
            n => format!("{disk}.{n}"),
        }
    }
}

impl DiskRecord {
    /// The current image.
    pub fn current(&self) -> DiskImage {
        DiskImage {
            generation: self.generation,
            format: self.format,
            pool: self.pool.clone(),
            preallocation: self.preallocation,
            encrypted: self.encrypted,
        }
    }

    /// Its size after a resize_disk in progress.
    pub fn size_after_resize(&self) -> MiB {
        self.resize_target.map_or(self.size, |target| target.max(self.size))
    }

    /// The same disk with `image` as its current image.
    pub fn with_image(&self, image: &DiskImage) -> Self {
        let DiskImage { generation, format, pool, preallocation, encrypted } = image.clone();
        Self { generation, format, pool, preallocation, encrypted, ..self.clone() }
    }

    /// Swaps the current and the inactive image.
    pub fn switch_image(&mut self) {
        if let Some(image) = &self.inactive_image {
            *self = Self { inactive_image: Some(self.current()), ..self.with_image(image) };
        }
    }

    /// File name of its current image.
    pub fn image(&self) -> String {
        self.current().file_name()
    }
}

/// A snapshot of a persistent disk: a copy of its whole image.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// Version of the layout.
    pub schema: u32,
    /// Its cid.
    pub cid: SnapshotCid,
    /// Its phase.
    pub phase: Phase,
    /// Start of snapshot_disk, UTC. The copy has the disk's content of that time or of shortly
    /// after it.
    pub created_at: String,
    /// The disk's record at that time. The copy is in the same pool, and encrypted if the disk was.
    pub disk: DiskRecord,
    /// Format of the copy.
    pub format: Format,
    /// The metadata argument of snapshot_disk.
    pub metadata: Map<String, Value>,
    /// Fields that a newer version added.
    #[serde(flatten)]
    pub newer: Map<String, Value>,
}

impl SnapshotRecord {
    /// The copy's image.
    pub fn image(&self) -> DiskImage {
        DiskImage {
            generation: 0,
            format: self.format,
            preallocation: Preallocation::Off,
            ..self.disk.current()
        }
    }
}

impl Record for DiskRecord {
    type Cid = DiskCid;

    const RANK: Rank = Rank::Disk;

    fn cid(&self) -> &DiskCid {
        &self.cid
    }

    fn phase(&self) -> Phase {
        self.phase
    }

    fn set_phase(&mut self, phase: Phase) {
        self.phase = phase;
    }

    fn pools(&self) -> Vec<&str> {
        let inactive = self.inactive_image.as_ref().and_then(|image| image.pool.as_deref());
        self.pool.as_deref().into_iter().chain(inactive).collect()
    }
}
