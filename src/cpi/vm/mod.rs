//! VMs: one file for each verb, and what the verbs share.

pub mod host_boot;
pub mod orphans;

mod calculate;
mod create;
mod delete;
mod has;
mod images;
mod metadata;
mod reboot;
mod reclaim;
mod recover;

pub(super) use calculate::calculate;
pub(super) use create::create;
pub(super) use delete::delete;
pub(super) use has::exists;
pub(super) use metadata::set_metadata;
pub(super) use reboot::reboot;
pub(super) use recover::recover;
