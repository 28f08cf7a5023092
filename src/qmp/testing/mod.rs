//! Monitors for the tests of this module: a QEMU with a tiny guest, a monitor that follows a
//! script, a proxy that closes the connection after a number of commands.

mod closing_proxy;
mod guest;
mod scripted;

pub use closing_proxy::ClosingProxy;
pub use guest::{Guest, Image};
pub use scripted::{Peer, ScriptedMonitor};

use std::time::{Duration, Instant};

/// Longest time for any successful step of a test, even on a busy machine.
pub const TEST_TIMEOUT: Duration = Duration::from_secs(30);

/// A deadline that only a failing test reaches.
pub fn test_deadline() -> Instant {
    Instant::now() + TEST_TIMEOUT
}
