//! Persistent disks and their snapshots.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Format, Phase, Record};
use crate::cid::{Cid, DiskCid, SnapshotCid, VmCid};
pub use crate::store::disk_options::{Cache, Discard, Preallocation};
use crate::units::MiB;

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
    #[serde(rename = "grows_to")]
    pub resize_target: Option<MiB>,
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
    #[serde(rename = "leftover")]
    pub inactive_image: Option<DiskImage>,
    /// The VM that may have it: that VM's record decides. Always written before the VM's.
    pub vm: Option<VmCid>,
    /// The most it may do.
    #[serde(default)]
    pub limits: Limits,
    /// The disk type's cloud properties.
    pub cloud_properties: Map<String, Value>,
    /// What set_disk_metadata said, as the first versions kept it: see [`crate::store::Store::disk_metadata`].
    #[serde(default, skip_serializing_if = "Map::is_empty")]
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
    pub fn size_after_resize(&self) -> MiB {
        self.resize_target.map_or(self.size, |more| more.max(self.size))
    }

    /// The same disk with another image in force.
    pub fn with_image(&self, image: &DiskImage) -> Self {
        let DiskImage { generation, format, pool, preallocation, encrypted } = image.clone();
        Self { generation, format, pool, preallocation, encrypted, ..self.clone() }
    }

    /// Puts the leftover in force; what was in force is the leftover now.
    pub fn switch(&mut self) {
        if let Some(image) = &self.inactive_image {
            *self = Self { inactive_image: Some(self.current()), ..self.with_image(image) };
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

    fn cid(&self) -> &DiskCid {
        &self.cid
    }

    fn phase(&self) -> Phase {
        self.phase
    }

    fn pools(&self) -> Vec<&str> {
        let leftover = self.inactive_image.as_ref().and_then(|leftover| leftover.pool.as_deref());
        self.pool.as_deref().into_iter().chain(leftover).collect()
    }
}
