//! Persistent disks: every method about them, snapshots, pools and serials.

pub mod attach;
mod hotplug;
pub mod metadata;
mod pools;
mod properties;
mod resize;
mod serials;
pub mod snapshots;
mod update;
