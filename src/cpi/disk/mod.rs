//! Persistent disks and their snapshots: one file for each verb, and what the verbs share.
//!
//! ```text
//!   create delete attach detach resize update snapshot metadata   the verbs
//!   restore release take recover                                  the operator's, and recovery
//!   settled                     a disk under its lock, with every interrupted copy settled
//!   copy backup progress        copies of a disk: into another image, a snapshot; their log
//!   access images encryption    its image: which process has it open, how it is made, its key
//!   attachment ownership lock   the VM that has it, the host that owns it, the lock
//! ```

mod access;
mod attach;
mod attachment;
mod backup;
mod copy;
mod create;
mod delete;
mod detach;
mod encryption;
mod images;
mod lock;
mod metadata;
mod ownership;
mod progress;
mod recover;
mod release;
mod resize;
mod restore;
mod settled;
mod snapshot;
mod take;
mod update;

pub(super) use attach::attach;
pub(super) use attachment::attached_to;
pub(crate) use attachment::settle as settle_attachment;
pub(super) use backup::recover as recover_snapshot;
pub(super) use create::create;
pub(super) use delete::delete;
pub(super) use detach::detach;
pub(super) use metadata::set_metadata;
pub(super) use ownership::exists;
pub(super) use recover::recover;
pub(crate) use release::release;
pub(super) use resize::resize;
pub(super) use restore::restore;
pub(crate) use settled::lock as lock_settled;
pub(super) use snapshot::{create as create_snapshot, delete as delete_snapshot};
pub(crate) use take::take;
pub(super) use update::update;
