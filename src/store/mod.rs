//! What the CPI knows, kept in the state directory. The drawing of it is in [`layout`].
//!
//! The record is the journal: it is written (phase `creating`) before the first resource it names, every resource's
//! name can be derived from it, and it is removed last. So whoever finds a record in phase `creating` or `deleting`
//! whose lock is free can finish the removal. A record has one writer: whoever holds the object's [`lock`].
//!
//! This room knows files, not QEMU or networks.

pub mod atomic;
pub mod disk_key;
mod disk_metadata;
pub mod disk_options;
pub mod layout;
pub mod lock;
mod locks;
pub mod nic_rules;
mod objects;
mod ownership;
mod pins;
pub mod pool;
pub mod record;
pub mod reservations;
mod state_dir_id;
mod vm_paths;

pub use disk_key::DiskKey;
pub use layout::Store;
pub use lock::{Guard, Rank, ShortLock, TryLock};
pub use pool::Pools;
pub use record::{DiskRecord, Phase, Record, SnapshotRecord, StemcellRecord, VmRecord};
pub use state_dir_id::StateDirId;
pub use vm_paths::VmPaths;
