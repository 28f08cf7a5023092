//! Integration tests: the built program, everything that acts on a real host, and rules about the
//! source.

mod audit;
mod contract;
mod disk;
mod faults;
mod linux;
mod model;
mod network;
mod remote;
mod source;
mod support;
mod vm;
