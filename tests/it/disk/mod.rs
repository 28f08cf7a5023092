//! Persistent disks: every method about them, snapshots, pools and serials.

mod attach;
mod hostile_pools;
mod hotplug;
mod metadata;
mod pools;
mod properties;
mod resize;
mod serials;
mod snapshots;
mod update;
