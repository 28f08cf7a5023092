//! Speaking QMP to a running QEMU: the connection, hot-plug of disks, block jobs, power.
//!
//! ```text
//!   hotplug, job   power       what the CPI and the supervisor want from a running machine
//!      │     ╱   │
//!   monitor      │             sync facade for a CPI call, one deadline for all of it
//!        ╲       │
//!         connection           one socket: requests, replies, events, descriptors (async, no task of its own)
//!             │
//!     wire · event · query     bytes to messages; the answers we read
//! ```
//!
//! Commands and their answers are `qapi`'s types; its transport is not used: it ends at the first event its schema
//! does not know and panics when a call that timed out is followed by another (qapi 0.15). Answers of which we need
//! one field, or whose enums grow with every QEMU, have lean types in [`query`].
//!
//! This layer knows QEMU's ids and nodes, not cids, records or BOSH. QEMU is not trusted: a guest that broke out
//! speaks through this socket, so lines and queues are bounded, every wait has a deadline, and text from QEMU is
//! cut and escaped before it reaches a message.
//!
//! QEMU serves one client per monitor socket and lets the next one hang, so a CPI call connects, acts and closes;
//! the supervisor has a socket of its own.

pub mod connection;
pub mod error;
pub mod event;
pub mod hotplug;
pub mod job;
pub mod monitor;
pub mod power;
pub mod query;
mod wire;

#[cfg(test)]
mod testing;

pub use connection::Connection;
pub use error::MonitorError;
pub use event::{Event, EventKind};
pub use monitor::Monitor;
