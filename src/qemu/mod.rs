//! From a VM's record to QEMU's command line and JSON options. Pure: nothing here touches the host or knows BOSH.
//!
//! QEMU opens no path of ours. Every file reaches it as a descriptor ([`files`]), so the guest's process needs no
//! right to any directory (the launch sequence is in [`crate::supervisor`]).

pub mod blockdev;
pub mod command_line;
pub mod files;
pub mod template;
pub mod topology;

pub use command_line::{InheritedFds, command_line};
pub use files::{FileSpec, OpenedFile};
pub use template::Template;
