//! Integration tests: the built binary from outside, everything that acts on a real host, and rules about the source.

mod audit;
mod contract;
mod crashes;
mod disk_crashes;
mod disk_properties;
mod disk_resize;
mod disk_update;
mod disks;
mod docs;
mod door;
mod full;
mod host_boot;
mod hostile;
mod hotplug;
mod identity;
mod layers;
mod lifecycle;
mod linux;
mod network;
mod pools;
mod release;
mod snapshots;
mod supervisor;
mod support;
mod traces;
mod vm_list;
