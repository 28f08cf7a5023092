//! VMs.

pub mod calculate;
pub mod create;
pub mod host_boot;
pub mod metadata;
pub mod reclaim;
