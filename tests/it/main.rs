//! Integration tests: the built binary from outside, everything that acts on a real host, and rules about the source.

mod addresses;
mod contract;
mod disks;
mod docs;
mod door;
mod guard;
mod hostile;
mod layers;
mod lifecycle;
mod linux;
mod managed_networks;
mod network;
mod network_command;
mod network_profiles;
mod release;
mod supervisor;
mod support;
mod traces;
