//! The methods of the CPI contract (API versions 2 and 3) and their types.
//!
//! `rpc` turns JSON into these calls and their results into JSON; [`Cpi`](super::Cpi) implements
//! the methods. Three rules hold for all of them, because the Director repeats calls after a crash
//! and knows only the answers:
//!
//! - success means done and durable; a method that cannot do its work fails before it changes
//!   anything;
//! - deleting what does not exist, attaching what is attached and detaching what is not attached
//!   succeed;
//! - a create that fails leaves nothing behind: the caller has no cid to delete it with.
//!
//! Any method may fail with [`ErrorKind::Conflict`], [`ErrorKind::Timeout`], [`ErrorKind::Corrupt`]
//! and [`ErrorKind::Host`]. Each lists the other kinds that its callers act on (Director 283,
//! bosh-cli 7.10).

pub mod networks;

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use self::networks::Networks;
use crate::cid::{DiskCid, NetworkCid, SnapshotCid, StemcellCid, VmCid};
use crate::error::{Error, ErrorKind, Result};
use crate::schema::{Redacted, Whole};
use crate::units::MiB;

/// The operator's properties of a stemcell, VM or disk. The Director redacts them in its log; so
/// does this program.
pub type CloudProperties = Redacted<Map<String, Value>>;

/// Tags of a VM, disk or snapshot. Values are mostly strings, but a snapshot's `index` is a number.
pub type Metadata = Map<String, Value>;

/// The methods of the CPI contract, except `info`: that works without a configuration and a state
/// directory.
pub trait Contract {
    /// Imports the image, whose file the caller deletes when the call returns. Every call makes a
    /// stemcell of its own, which is deleted independently. Slow.
    ///
    /// # Errors
    /// [`ErrorKind::NotSupported`] for a disk format that this CPI does not boot,
    /// [`ErrorKind::NoDiskSpace`].
    fn create_stemcell(&self, stemcell: CreateStemcell) -> Result<StemcellCid>;

    /// Deletes the stemcell; its image stays until the last VM based on it is deleted. An unknown
    /// stemcell is a success: the Director treats `StemcellNotFound` as a failure.
    fn delete_stemcell(&self, stemcell: &StemcellCid) -> Result<()>;

    /// Creates the VM and powers it on, without waiting for its agent. Returns the networks with
    /// the values chosen here (`mac`, the address of a dynamic network).
    ///
    /// # Errors
    /// [`ErrorKind::VmCreationFailed`]: nothing is left; with `retry` the Director repeats the call
    /// at once, up to five times in all. [`ErrorKind::StemcellNotFound`],
    /// [`ErrorKind::NetworkNotFound`].
    fn create_vm(&self, vm: CreateVm) -> Result<(VmCid, Networks)>;

    /// Deletes the VM, on or off, complete or not, and everything of it on the host before it
    /// returns: the Director may give its addresses to another VM at once. Persistent disks are
    /// kept and detached. An unknown VM is a success, after whatever is left of it is removed.
    fn delete_vm(&self, vm: &VmCid) -> Result<()>;

    /// Records that the caller has received the answer, and with it the cid of the new object.
    fn acknowledge(&self) {}

    /// Whether the VM exists, on or off.
    fn has_vm(&self, vm: &VmCid) -> Result<bool>;

    /// Restarts a VM that is on, starts one that is off. It keeps its disks and NICs; the call does
    /// not wait for the agent.
    ///
    /// # Errors
    /// [`ErrorKind::VmNotFound`].
    fn reboot_vm(&self, vm: &VmCid) -> Result<()>;

    /// Replaces the VM's tags. The Director calls this right after `create_vm`, and deletes the VM
    /// if it fails: it is cheap and does not touch the guest. It must not fail with
    /// [`ErrorKind::NotSupported`].
    ///
    /// # Errors
    /// [`ErrorKind::VmNotFound`].
    fn set_vm_metadata(&self, vm: &VmCid, metadata: Metadata) -> Result<()>;

    /// The cloud properties of a VM with these resources. Pure.
    fn calculate_vm_cloud_properties(&self, resources: VmResources) -> Result<Map<String, Value>>;

    /// Creates an empty persistent disk.
    ///
    /// # Errors
    /// [`ErrorKind::NoDiskSpace`].
    fn create_disk(&self, disk: CreateDisk) -> Result<DiskCid>;

    /// Deletes the disk and its data. An attached disk is refused with [`ErrorKind::Conflict`]; an
    /// unknown disk is a success.
    fn delete_disk(&self, disk: &DiskCid) -> Result<()>;

    /// Whether the disk exists.
    fn has_disk(&self, disk: &DiskCid) -> Result<bool>;

    /// Attaches the disk to the VM, on or off, and returns where the guest finds it. The hint stays
    /// the same over repetitions, reboots and other disks. A disk that is attached to another VM is
    /// refused with [`ErrorKind::Conflict`].
    ///
    /// # Errors
    /// [`ErrorKind::VmNotFound`], [`ErrorKind::DiskNotFound`].
    fn attach_disk(&self, vm: &VmCid, disk: &DiskCid) -> Result<DiskHint>;

    /// Detaches the disk, and returns when the guest has released it. A disk that is not attached
    /// is a success: `DiskNotAttached` would fail every repetition of the Director's task.
    ///
    /// # Errors
    /// [`ErrorKind::VmNotFound`]; [`ErrorKind::Timeout`] if the guest does not release it: it stays
    /// attached and intact.
    fn detach_disk(&self, vm: &VmCid, disk: &DiskCid) -> Result<()>;

    /// The persistent disks attached to the VM.
    ///
    /// # Errors
    /// [`ErrorKind::VmNotFound`].
    fn get_disks(&self, vm: &VmCid) -> Result<Vec<DiskCid>>;

    /// Replaces the disk's tags. It must not fail with [`ErrorKind::NotSupported`].
    ///
    /// # Errors
    /// [`ErrorKind::DiskNotFound`].
    fn set_disk_metadata(&self, disk: &DiskCid, metadata: Metadata) -> Result<()>;

    /// Copies a disk that is attached, mounted and in use. The copy outlives the disk's detachment.
    ///
    /// # Errors
    /// [`ErrorKind::NotImplemented`], which the Director skips silently;
    /// [`ErrorKind::DiskNotFound`], [`ErrorKind::NoDiskSpace`].
    fn snapshot_disk(&self, _disk: &DiskCid, _metadata: Metadata) -> Result<SnapshotCid> {
        Err(not_implemented("snapshots"))
    }

    /// Deletes a snapshot. An unknown snapshot is a success.
    fn delete_snapshot(&self, _snapshot: &SnapshotCid) -> Result<()> {
        Err(not_implemented("snapshots"))
    }

    /// Grows a disk, attached or not. The size that it has is a success.
    ///
    /// # Errors
    /// [`ErrorKind::NotSupported`] before anything is changed: the Director then copies to a new
    /// disk. Any other error fails its task and leaves the disk detached.
    /// [`ErrorKind::DiskNotFound`], [`ErrorKind::NoDiskSpace`].
    fn resize_disk(&self, _disk: &DiskCid, _size: MiB) -> Result<()> {
        Err(Error::new(ErrorKind::NotSupported, "disks are not resized in place"))
    }

    /// Changes the size and properties of a disk, attached or not. Returns its new cid, if it got
    /// one.
    ///
    /// # Errors
    /// As for [`Contract::resize_disk`].
    fn update_disk(
        &self,
        _disk: &DiskCid,
        _size: MiB,
        _cloud_properties: CloudProperties,
    ) -> Result<Option<DiskCid>> {
        Err(Error::new(ErrorKind::NotSupported, "disks are not changed in place"))
    }

    /// Creates a network for a subnet that the Director manages: `type`, `cloud_properties`, and
    /// `range` and `gateway`, or `netmask_bits` for a range that the CPI chooses.
    fn create_network(&self, _subnet: Map<String, Value>) -> Result<CreatedNetwork> {
        Err(not_implemented("managed networks"))
    }

    /// Deletes a network made by [`Contract::create_network`].
    ///
    /// # Errors
    /// [`ErrorKind::NetworkNotFound`], which the Director treats as success.
    fn delete_network(&self, _network: &NetworkCid) -> Result<()> {
        Err(not_implemented("managed networks"))
    }
}

fn not_implemented(what: &str) -> Error {
    Error::new(ErrorKind::NotImplemented, format!("{what} are not implemented"))
}

/// Arguments of `create_stemcell`.
#[derive(Debug)]
pub struct CreateStemcell {
    /// Path of the file `image` of the stemcell's tarball. Only the caller's user can read it, and
    /// only during the call.
    pub image: PathBuf,
    /// The stemcell manifest's cloud properties, verbatim. Empty if it has none.
    pub cloud_properties: CloudProperties,
    /// Tags for the CPI's copy of the stemcell (API version 3).
    pub tags: Metadata,
}

/// Arguments of `create_vm`.
#[derive(Debug)]
pub struct CreateVm {
    /// Identity of its agent: new for every VM, the same when a failed create is repeated.
    pub agent_id: AgentId,
    /// The stemcell that it boots.
    pub stemcell: StemcellCid,
    /// Cloud properties of availability zone, VM type and VM extensions, merged by the Director.
    pub cloud_properties: CloudProperties,
    /// In the manifest's order: the order of its NICs.
    pub networks: Networks,
    /// Disks that will probably be attached to it. A hint for placement only: in a hot swap they
    /// are still attached to the old VM, which runs.
    pub disks: Vec<DiskCid>,
    /// The document for its agent, verbatim.
    pub env: Env,
}

/// Arguments of `create_disk`.
#[derive(Debug)]
pub struct CreateDisk {
    /// At least 1 MiB.
    pub size: MiB,
    /// Cloud properties of the disk type.
    pub cloud_properties: CloudProperties,
    /// The VM that it will probably be attached to. It need not exist.
    pub vm: Option<VmCid>,
}

crate::document! {
    /// Argument of `calculate_vm_cloud_properties`: a manifest's `vm_resources`.
    pub struct VmResources {
        /// Virtual CPUs.
        cpu: Whole<1, 512>;
        /// Memory, MiB.
        ram: MiB;
        /// Ephemeral disk, MiB.
        ephemeral_disk_size: MiB;
    }
}

/// Answer of `create_network`.
#[derive(Debug)]
pub struct CreatedNetwork {
    /// The network.
    pub cid: NetworkCid,
    /// The chosen `range`, `gateway` and `reserved`.
    pub addresses: Map<String, Value>,
    /// Cloud properties that replace the subnet's in every later `create_vm`.
    pub cloud_properties: CloudProperties,
}

/// Where the guest finds a persistent disk. The agent stores it and uses it after every reboot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiskHint {
    /// A device path in the guest that does not depend on the order of disks:
    /// `/dev/disk/by-id/virtio-<disk cid>`.
    pub path: String,
}

/// Identity of an agent: its subject on the message bus and its host name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentId(String);

impl AgentId {
    /// The accepted texts, for messages.
    pub const EXPECTED: &'static str = "1 to 128 letters, digits, '-', '_' and '.'";

    /// Parses `text`, which must be one token of a NATS subject and a host name.
    pub fn parse(text: &str) -> Option<Self> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let valid = (1..=128).contains(&text.len())
            && text.chars().all(plain)
            && !text.starts_with(['-', '.']);
        valid.then(|| Self(text.to_owned()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for AgentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The Director's document for the agent: certificates, passwords, blobstores. It is never shown,
/// and passed on exactly as received, unknown keys and nulls included. It is a well-formed JSON
/// object.
#[derive(Clone, Serialize)]
#[serde(transparent)]
pub struct Env(Box<RawValue>);

impl Env {
    /// Parses `text`, which must be an object.
    pub fn new(text: &RawValue) -> Option<Self> {
        serde_json::from_str::<Map<String, Value>>(text.get())
            .is_ok()
            .then(|| Self(text.to_owned()))
    }

    /// The text of the object.
    pub fn get(&self) -> &RawValue {
        &self.0
    }

    /// The group of the VM, whose members the scheduler spreads over hosts: the tag
    /// `anti_affinity`, else the instance group.
    pub fn spread(&self) -> Option<String> {
        let env: Value = serde_json::from_str(self.0.get()).ok()?;
        let name = |value: &Value| {
            value.as_str().filter(|name| !name.is_empty() && name.len() <= 255).map(str::to_owned)
        };
        let bosh = env.get("bosh")?;
        bosh.get("tags")
            .and_then(|tags| name(tags.get("anti_affinity")?))
            .or_else(|| name(bosh.get("group")?))
    }
}

impl fmt::Debug for Env {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_is_the_tag_or_else_the_instance_group() {
        let spread = |text: &str| {
            Env::new(&RawValue::from_string(text.to_owned()).unwrap()).unwrap().spread()
        };
        assert_eq!(
            spread(r#"{"bosh":{"group":"d-dep-db","tags":{"anti_affinity":"x"}}}"#).unwrap(),
            "x"
        );
        assert_eq!(
            spread(r#"{"bosh":{"group":"d-dep-db","tags":{"anti_affinity":7}}}"#).unwrap(),
            "d-dep-db"
        );
        assert_eq!(spread(r#"{"bosh":{"tags":{}}}"#), None);
        assert_eq!(spread("{}"), None);
    }

    #[test]
    fn agent_id_must_fit_a_subject_and_a_host_name() {
        assert!(AgentId::parse("b43e94d7-46a3-4d97-4ec5-340fb1994e49").is_some());
        for text in ["", "*", "a>b", "a b", "-x", "../x", "a\0", &"x".repeat(129)] {
            assert!(AgentId::parse(text).is_none(), "{text:?}");
        }
    }

    #[test]
    fn env_is_passed_on_verbatim_and_not_shown() {
        let text = r#"{"z": 1.50, "bosh":{"password":"hunter2","x":null}}"#;
        let env = Env::new(&RawValue::from_string(text.into()).unwrap()).unwrap();
        assert_eq!(serde_json::to_string(&env).unwrap(), text);
        assert_eq!(format!("{env:?}"), "***");
        assert!(Env::new(&RawValue::from_string("[]".into()).unwrap()).is_none());
    }
}
