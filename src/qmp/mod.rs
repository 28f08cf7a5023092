//! Speaking to a live QEMU over QMP: one connection, commands and events, hot-plug, power.
//!
//! `qapi` gives the types of commands and answers. The transport is ours, because a CPI needs three things that crate's
//! has not: a call that timed out must not break the program, an event nobody knows must not end the connection, and
//! every command needs an id. QEMU serves one client per socket; a connection is opened for one job and closed.
//!
//! What QEMU says is as trustworthy as the guest in it: messages are bounded and nothing in them becomes a path.

pub mod connection;
pub mod hotplug;
pub mod monitor;
pub mod power;
