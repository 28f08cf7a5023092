//! Persistent disks.

pub mod attach;
pub mod copy;
pub mod create;
pub mod encryption;
pub mod lock;
pub mod ownership;
pub mod resize;
pub mod snapshot;
pub mod update;
