//! VMs: their life from create_vm to delete_vm, supervisors, control groups, the host's boot.

mod cgroups;
mod host_boot;
mod lifecycle;
mod list;
mod selftest;
mod supervisor;
mod systemd;
