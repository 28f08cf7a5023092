//! Subcommands
pub mod reference;
pub mod supervise;
