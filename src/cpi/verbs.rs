//! What the Director can ask for, in types: one method for each method of the CPI contract (API versions 2 and 3).
//!
//! `rpc` turns JSON into these calls and their outcome into JSON; the `Cpi` is what carries them out. Three rules
//! hold for all of them, because the Director repeats calls after a crash and knows only what was answered:
//!
//! - success means done and durable; what can not be done says so before it changes anything;
//! - deleting what is gone, attaching what is attached and detaching what is not attached succeed;
//! - a create that fails leaves nothing behind: the caller has no cid to clean up with.
//!
//! Any method may fail with [`ErrorKind::Conflict`], [`ErrorKind::Timeout`], [`ErrorKind::Corrupt`] and
//! [`ErrorKind::Host`]; each names the kinds beyond those that its callers act on (Director 283, bosh-cli 7.10).

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::cid::{DiskCid, NetworkCid, SnapshotCid, StemcellCid, VmCid};
use crate::cpi::networks::Networks;
use crate::error::{Error, ErrorKind, Result};
use crate::schema::{Redacted, Whole};
use crate::units::MiB;

/// The operator's properties of a stemcell, VM or disk. The Director redacts them in its log; so do we.
pub type CloudProperties = Redacted<Map<String, Value>>;

/// Tags of a VM, disk or snapshot. Values are mostly strings, but a snapshot's `index` is a number.
pub type Metadata = Map<String, Value>;

/// The methods of the CPI contract that act. `info` is not among them: it must work without any of this.
pub trait Verbs {
    /// Imports the image, which is gone when the call returns. Every call makes a stemcell of its own: two cids
    /// are deleted independently. Slow.
    ///
    /// # Errors
    /// [`ErrorKind::NotSupported`] for a disk format that does not boot here, [`ErrorKind::NoDiskSpace`].
    fn create_stemcell(&self, stemcell: CreateStemcell) -> Result<StemcellCid>;

    /// Forgets the stemcell; its image stays as long as a VM is based on it. An unknown one is a success: to the
    /// Director `StemcellNotFound` is a failure.
    fn delete_stemcell(&self, stemcell: &StemcellCid) -> Result<()>;

    /// Makes the VM and powers it on, without waiting for its agent. Gives back the networks with what was decided
    /// here (`mac`, the address of a dynamic network).
    ///
    /// # Errors
    /// [`ErrorKind::VmCreationFailed`]: nothing is left; with `retry` the Director calls again at once with the
    /// same arguments, up to five times in all. [`ErrorKind::StemcellNotFound`], [`ErrorKind::NetworkNotFound`].
    fn create_vm(&self, vm: CreateVm) -> Result<(VmCid, Networks)>;

    /// Removes the VM, running or not, half made or long gone, and everything of it on the host before it returns:
    /// its addresses may be given to another at once. Persistent disks, attached or not, are kept and released.
    /// An unknown VM is a success, after its leftovers are cleaned.
    fn delete_vm(&self, vm: &VmCid) -> Result<()>;

    /// Hears that the answer was taken that told of what this call made.
    fn acknowledge(&self) {}

    /// Whether the VM exists, running or not.
    fn has_vm(&self, vm: &VmCid) -> Result<bool>;

    /// Restarts a running VM, starts a stopped one. Same disks, same NICs; does not wait for the agent.
    ///
    /// # Errors
    /// [`ErrorKind::VmNotFound`].
    fn reboot_vm(&self, vm: &VmCid) -> Result<()>;

    /// Replaces the VM's tags. Called right after `create_vm`, where a failure destroys the VM: cheap, and never
    /// touches the guest. Not to be refused as [`ErrorKind::NotSupported`].
    ///
    /// # Errors
    /// [`ErrorKind::VmNotFound`].
    fn set_vm_metadata(&self, vm: &VmCid, metadata: Metadata) -> Result<()>;

    /// The cloud properties of a VM that has these resources. Pure.
    fn calculate_vm_cloud_properties(&self, resources: VmResources) -> Result<Map<String, Value>>;

    /// Makes an empty persistent disk.
    ///
    /// # Errors
    /// [`ErrorKind::NoDiskSpace`].
    fn create_disk(&self, disk: CreateDisk) -> Result<DiskCid>;

    /// Destroys the disk and its data. An attached one is refused with [`ErrorKind::Conflict`]; an unknown one is a
    /// success.
    fn delete_disk(&self, disk: &DiskCid) -> Result<()>;

    /// Whether the disk exists.
    fn has_disk(&self, disk: &DiskCid) -> Result<bool>;

    /// Attaches the disk to the VM, running or not, and says where the guest finds it: the same answer whenever it
    /// is asked again, over reboots and whatever else is plugged. Attached to another VM: [`ErrorKind::Conflict`].
    ///
    /// # Errors
    /// [`ErrorKind::VmNotFound`], [`ErrorKind::DiskNotFound`].
    fn attach_disk(&self, vm: &VmCid, disk: &DiskCid) -> Result<DiskHint>;

    /// Detaches the disk and returns when the guest has let go of it. One that is not attached is a success:
    /// `DiskNotAttached` would end every repetition of the Director's task.
    ///
    /// # Errors
    /// [`ErrorKind::VmNotFound`]; [`ErrorKind::Timeout`] when the guest keeps it, still attached and whole.
    fn detach_disk(&self, vm: &VmCid, disk: &DiskCid) -> Result<()>;

    /// The persistent disks attached to the VM.
    ///
    /// # Errors
    /// [`ErrorKind::VmNotFound`].
    fn get_disks(&self, vm: &VmCid) -> Result<Vec<DiskCid>>;

    /// Replaces the disk's tags. Not to be refused as [`ErrorKind::NotSupported`].
    ///
    /// # Errors
    /// [`ErrorKind::DiskNotFound`].
    fn set_disk_metadata(&self, disk: &DiskCid, metadata: Metadata) -> Result<()>;

    /// Copies a disk that is attached, mounted and in use. The copy outlives the disk's detachment.
    ///
    /// # Errors
    /// [`ErrorKind::NotImplemented`], which the Director skips silently; [`ErrorKind::DiskNotFound`],
    /// [`ErrorKind::NoDiskSpace`].
    fn snapshot_disk(&self, _disk: &DiskCid, _metadata: Metadata) -> Result<SnapshotCid> {
        Err(not_implemented("snapshots"))
    }

    /// Destroys a snapshot. An unknown one is a success.
    fn delete_snapshot(&self, _snapshot: &SnapshotCid) -> Result<()> {
        Err(not_implemented("snapshots"))
    }

    /// Grows a disk, attached or not; its own size is a success.
    ///
    /// # Errors
    /// [`ErrorKind::NotSupported`] before anything is changed: the Director then copies to a new disk. Any other
    /// error leaves its task failed with the disk detached. [`ErrorKind::DiskNotFound`], [`ErrorKind::NoDiskSpace`].
    fn resize_disk(&self, _disk: &DiskCid, _size: MiB) -> Result<()> {
        Err(Error::new(ErrorKind::NotSupported, "disks are not resized in place"))
    }

    /// Changes size and properties of a disk, attached or not; its new cid, if it got one.
    ///
    /// # Errors
    /// As for [`Verbs::resize_disk`].
    fn update_disk(
        &self,
        _disk: &DiskCid,
        _size: MiB,
        _cloud_properties: CloudProperties,
    ) -> Result<Option<DiskCid>> {
        Err(Error::new(ErrorKind::NotSupported, "disks are not changed in place"))
    }

    /// Makes a network for a subnet the Director manages: `type`, `cloud_properties` and, unless the CPI is to
    /// choose, `range`, `gateway` and `netmask_bits`.
    fn create_network(&self, _subnet: Map<String, Value>) -> Result<CreatedNetwork> {
        Err(not_implemented("managed networks"))
    }

    /// Removes a network made by [`Verbs::create_network`].
    ///
    /// # Errors
    /// [`ErrorKind::NetworkNotFound`], which the Director takes as done.
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
    /// The file called `image` of the stemcell's tarball, readable by the caller alone and only during the call.
    pub image: PathBuf,
    /// The stemcell manifest's, verbatim. Empty when it has none.
    pub cloud_properties: CloudProperties,
    /// Tags (API version 3), for whatever the CPI calls its copy.
    pub tags: Metadata,
}

/// Arguments of `create_vm`.
#[derive(Debug)]
pub struct CreateVm {
    /// Who the agent in it will be. Fresh for every VM, the same when a failed creation is repeated.
    pub agent_id: AgentId,
    /// What it boots.
    pub stemcell: StemcellCid,
    /// Of availability zone, VM type and VM extensions, merged by the Director.
    pub cloud_properties: CloudProperties,
    /// In the manifest's order: the order of its NICs.
    pub networks: Networks,
    /// Disks it will probably be given later. A hint for placement: in a hot swap they are attached to the old,
    /// running VM, and must not be touched.
    pub disks: Vec<DiskCid>,
    /// What the agent is told, verbatim.
    pub env: Env,
}

/// Arguments of `create_disk`.
#[derive(Debug)]
pub struct CreateDisk {
    /// At least 1 MiB.
    pub size: MiB,
    /// The disk type's.
    pub cloud_properties: CloudProperties,
    /// The VM it will probably be attached to; it need not exist.
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
    /// `range`, `gateway` and `reserved` as chosen.
    pub addresses: Map<String, Value>,
    /// Replace the subnet's in every later `create_vm`.
    pub cloud_properties: CloudProperties,
}

/// Where the guest finds a persistent disk. The agent keeps it and uses it again after every reboot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiskHint {
    /// A device path in the guest that names the disk, not its turn: `/dev/disk/by-id/virtio-<disk cid>`.
    pub path: String,
}

/// Who an agent is: its subject on the message bus and its host name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentId(String);

impl AgentId {
    /// What is accepted, in words.
    pub const EXPECTED: &'static str = "1 to 128 letters, digits, '-', '_' and '.'";

    /// `text`, if it can be one token of a NATS subject and a host name.
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

/// What the Director tells the agent: certificates, passwords, blobstores. Never shown, and handed on as it was
/// written: unknown keys, nulls and all. An object, well-formed to the last value.
#[derive(Clone, Serialize)]
#[serde(transparent)]
pub struct Env(Box<RawValue>);

impl Env {
    /// `text`, if it is an object.
    pub fn new(text: &RawValue) -> Option<Self> {
        serde_json::from_str::<Map<String, Value>>(text.get())
            .is_ok()
            .then(|| Self(text.to_owned()))
    }

    /// The text of the object.
    pub fn get(&self) -> &RawValue {
        &self.0
    }

    /// The word that VMs share which had better not be on one host: the tag `anti_affinity`, else the instance group.
    pub fn spread(&self) -> Option<String> {
        let env: Value = serde_json::from_str(self.0.get()).ok()?;
        let word = |value: &Value| {
            value.as_str().filter(|word| !word.is_empty() && word.len() <= 255).map(str::to_owned)
        };
        let bosh = env.get("bosh")?;
        bosh.get("tags")
            .and_then(|tags| word(tags.get("anti_affinity")?))
            .or_else(|| word(bosh.get("group")?))
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
    fn vms_are_spread_by_their_tag_or_else_by_their_group() {
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
    fn an_agent_id_is_safe_in_a_subject_and_a_host_name() {
        assert!(AgentId::parse("b43e94d7-46a3-4d97-4ec5-340fb1994e49").is_some());
        for text in ["", "*", "a>b", "a b", "-x", "../x", "a\0", &"x".repeat(129)] {
            assert!(AgentId::parse(text).is_none(), "{text:?}");
        }
    }

    #[test]
    fn env_is_handed_on_as_written_and_never_shown() {
        let text = r#"{"z": 1.50, "bosh":{"password":"hunter2","x":null}}"#;
        let env = Env::new(&RawValue::from_string(text.into()).unwrap()).unwrap();
        assert_eq!(serde_json::to_string(&env).unwrap(), text);
        assert_eq!(format!("{env:?}"), "***");
        assert!(Env::new(&RawValue::from_string("[]".into()).unwrap()).is_none());
    }
}
