//! Integration tests: the built binary from outside, everything that acts on a real host, and rules about the source.

mod contract;
mod crashes;
mod disks;
mod docs;
mod door;
mod full;
mod groups;
mod host_boot;
mod hostile;
mod layers;
mod lifecycle;
mod linux;
mod model;
mod network;
mod release;
mod storms;
mod supervisor;
mod support;
mod traces;
mod vm_list;
