//! Networks: the NICs of a new VM and their addresses, managed networks, and the bridges of this
//! host.

pub mod addresses;
pub mod host;
pub mod nics;

mod create;
mod delete;
mod managed;
mod reclaim;
mod recover;

pub(super) use create::create;
pub(crate) use delete::delete;
pub(super) use managed::ensure_exist;
pub(crate) use managed::is_managed;
pub(super) use recover::recover;
