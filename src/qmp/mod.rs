//! Client for QMP, QEMU's monitor protocol: the connection, hot-plug of disks, block jobs, power.
//!
//! ```text
//!   hotplug, job   power       operations of CPI calls and the supervisor on a running machine
//!      │     ╱   │
//!   monitor      │             sync facade for a CPI call, with one deadline for all commands
//!        ╲       │
//!         connection           one socket: commands, replies, events, descriptors (async)
//!             │
//!     wire · event · query     bytes to messages; replies parsed in part
//! ```
//!
//! Commands and replies are `qapi`'s types. Its transport is not used: it ends at the first event
//! its schema does not know, and panics when another call follows one that timed out (qapi 0.15).
//! [`query`] has smaller types for replies of which few fields are needed, or whose enums grow with
//! every QEMU.
//!
//! This layer knows QEMU's ids and nodes, not cids, records or BOSH. QEMU is not trusted: a guest
//! that broke out controls this socket. So lines and queues are bounded, every wait has a deadline,
//! and text from QEMU is truncated and escaped before it reaches a message.
//!
//! QEMU serves one client per monitor socket and leaves the next one waiting. So a CPI call
//! connects, acts and closes; the supervisor has its own socket.

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
