//! One file for each command.

pub mod audit;
pub mod cpi;
pub mod disk;
pub mod host;
pub mod network;
pub mod reference;
pub mod selftest;
pub mod supervise;
pub mod vm;
