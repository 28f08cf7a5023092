//! One file for each command.

pub mod cpi;
pub mod disk;
pub mod reference;
pub mod selftest;
pub mod supervise;
pub mod vm;
