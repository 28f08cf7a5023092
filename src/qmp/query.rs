//! Queries whose replies are parsed in part.
//!
//! `qapi`'s types for them name every field and every enum value of one QEMU version, and fail on
//! those of the next.

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
    /// Whether the machine runs, and its state.
    QueryStatus = "query-status" -> Status;
    /// All block jobs.
    QueryJobs = "query-jobs" -> Vec<Job>;
    /// The guest's disk devices and their disks.
    QueryBlock = "query-block" -> Vec<BlockDevice>;
}

/// All block nodes, including those below other nodes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryNamedBlockNodes {
    /// Omits the chain of backing images below each node; each has its own entry anyway.
    pub flat: bool,
}

impl Command for QueryNamedBlockNodes {
    type Ok = Vec<BlockNode>;
    const NAME: &'static str = "query-named-block-nodes";
    const ALLOW_OOB: bool = false;
}

/// Whether the machine runs, and its state.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// Whether the vCPUs run.
    pub running: bool,
    /// QEMU's RunState: `running`, `prelaunch`, `paused`, `io-error`, `guest-panicked`, `shutdown`,
    /// … New QEMU versions add states.
    #[serde(rename = "status")]
    pub state: String,
}

impl Status {
    /// Whether QEMU was started with `-S` and not continued yet: the guest has not run.
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
    /// The image that the node provides.
    pub image: NodeImage,
}

/// The image that a block node provides to the nodes above it.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NodeImage {
    /// Virtual size, bytes.
    pub virtual_size: u64,
}

/// A disk device of the guest.
#[derive(Debug, Clone, Deserialize)]
pub struct BlockDevice {
    /// Its path in QEMU's object tree, or its id.
    pub qdev: Option<String>,
    /// The disk in the device.
    pub inserted: Option<Inserted>,
}

/// The disk in a device.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Inserted {
    /// The name of the device's node. A filter node that a job inserted above it is skipped.
    pub node_name: Option<String>,
}

/// A block job.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Job {
    /// The id it was started with.
    pub id: String,
    /// `running`, `ready`, `concluded`, …
    pub status: String,
    /// Why the job failed, once it has concluded. QEMU's text.
    #[serde(default)]
    pub error: Option<String>,
    /// Work done, without a unit.
    #[serde(default)]
    pub current_progress: u64,
    /// Work in total; it may still grow.
    #[serde(default)]
    pub total_progress: u64,
}
