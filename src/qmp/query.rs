//! Questions whose answers we read in part.
//!
//! `qapi`'s types for these name every field and every enum value of one QEMU version, and fail on the next one's.

use qapi::Command;
use serde::{Deserialize, Serialize};

macro_rules! query {
    ($($(#[$doc:meta])* $query:ident = $name:literal -> $answer:ty;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Serialize)]
        pub struct $query {}

        impl Command for $query {
            type Ok = $answer;
            const NAME: &'static str = $name;
            const ALLOW_OOB: bool = false;
        }
    )*};
}

query! {
    /// Does the machine run?
    QueryStatus = "query-status" -> Status;
    /// Which jobs are there?
    QueryJobs = "query-jobs" -> Vec<Job>;
    /// Which disks do the guest's devices have?
    QueryBlock = "query-block" -> Vec<BlockDevice>;
}

/// Which block nodes are there? All of them, also those below others.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryNamedBlockNodes {
    /// Leaves out the chain of backing images below each node, which has its own entries anyway.
    pub flat: bool,
}

impl Command for QueryNamedBlockNodes {
    type Ok = Vec<BlockNode>;
    const NAME: &'static str = "query-named-block-nodes";
    const ALLOW_OOB: bool = false;
}

/// Whether the machine runs, and if not, why.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// vCPUs run.
    pub running: bool,
    /// QEMU's RunState: `running`, `prelaunch`, `paused`, `io-error`, `guest-panicked`, `shutdown`, … New versions
    /// add words.
    #[serde(rename = "status")]
    pub state: String,
}

impl Status {
    /// Started with `-S` and not continued yet: the guest has not run.
    pub fn is_prelaunch(&self) -> bool {
        self.state == "prelaunch"
    }
}

/// A block node.
#[derive(Debug, Clone, Deserialize)]
pub struct BlockNode {
    /// Its name.
    #[serde(rename = "node-name")]
    pub name: String,
    /// What it shows.
    pub image: NodeImage,
}

/// What a block node shows to those above it.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NodeImage {
    /// Its size, bytes.
    pub virtual_size: u64,
}

/// A device of the guest with a place for a disk.
#[derive(Debug, Clone, Deserialize)]
pub struct BlockDevice {
    /// Its path in QEMU's object tree, or its id.
    pub qdev: Option<String>,
    /// The disk in it.
    pub inserted: Option<Inserted>,
}

/// The disk in a device.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Inserted {
    /// The node it is. A filter that a job put above it is left out.
    pub node_name: Option<String>,
}

/// A block job.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Job {
    /// The name it was started with.
    pub id: String,
    /// `running`, `ready`, `concluded`, …
    pub status: String,
    /// Why it failed, once it is concluded. QEMU's text.
    #[serde(default)]
    pub error: Option<String>,
    /// How much is done, in no unit.
    #[serde(default)]
    pub current_progress: u64,
    /// How much there is; it may still grow.
    #[serde(default)]
    pub total_progress: u64,
}
