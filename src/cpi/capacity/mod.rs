//! Capacity: whether a new image fits into its pool, and what this host reports to the scheduler of
//! a group.
//!
//! An image is admitted if its filesystem has room for what the image needs now. That is
//!
//! - its whole size, for a preallocated image;
//! - its headers with `overcommit`, its whole size without, for a thin image;
//! - what the source takes, for a copy; the whole size where a copy has no holes;
//! - what the file takes, for a stemcell's image. It asks for more piece by piece as it grows, and
//!   never gets the last part of a filesystem: its file does not state how much it needs.
//!
//! The room is what the filesystem has free, less what creates and copies in other processes will
//! still take and, without `overcommit`, less what all thin images on it may still grow by. One
//! lock is held from the check until the record is written, which others count. Other hosts that
//! use a shared pool are not counted.

pub mod need;
pub mod report;
pub mod usage;

mod admission;
mod images;

pub(super) use admission::{admit, grant};
pub(super) use report::ensure_group_not_grown;
