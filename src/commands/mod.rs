//! One file for each command.

pub mod cpi;
pub mod network;
pub mod reference;
pub mod selftest;
pub mod supervise;
