//! Subcommands
pub mod reference;
pub mod selftest;
pub mod supervise;
