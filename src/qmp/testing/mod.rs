//! What tests of this folder speak to: a QEMU with a tiny guest, a monitor that follows a script, a connection that
//! is cut after so many commands.

mod cut;
mod guest;
mod scripted;

pub use cut::Cut;
pub use guest::{Guest, Image};
pub use scripted::{Peer, Scripted};

use std::time::{Duration, Instant};

/// Longer than anything that works takes here, even on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A deadline that only a failing test reaches.
pub fn patience() -> Instant {
    Instant::now() + PATIENCE
}
