//! The commands of the program, one file or directory for each.

pub mod audit;
pub mod cpi;
pub mod disk;
pub mod host;
mod local;
pub mod network;
pub mod pool;
pub mod reference;
pub mod selftest;
pub mod supervise;
mod table;
pub mod vm;
