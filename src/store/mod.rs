//! The state directory: its layout, records, locks, reservations, and the ownership of shared
//! disks. [`layout`] draws it.
//!
//! The record is the journal. A create writes it (phase `creating`) before it makes the first
//! resource, every resource's name follows from it, and a delete removes it last. So a call that
//! finds a record in phase `creating` or `deleting` with a free lock can finish the removal. A
//! record has one writer: the holder of the object's [`lock`].
//!
//! This module knows files, but not QEMU or networks.

pub mod atomic;
pub mod beneath;
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
