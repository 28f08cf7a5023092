//! Builds QEMU's command line and JSON options from a VM's record. Pure, except that [`template`]
//! reads a template's file. This module knows no BOSH method.
//!
//! QEMU opens no file by its path. It inherits a descriptor for every file ([`files`]), so its
//! process needs no access to any directory (the launch sequence is in [`crate::supervisor`]).

pub mod blockdev;
pub mod command_line;
pub mod files;
pub mod template;
pub mod topology;

pub use command_line::{InheritedFds, command_line};
pub use files::{FileSpec, OpenedFile};
pub use template::Template;
