//! Calls for hosts that are other machines, or the other side of a socket.
//!
//! ```text
//!   Director, bosh CLI                                              the host
//!     │ request                                                        ▲ request
//!     ▼                                                                │
//!   rpc ─▶ caller ─▶ link: ssh │ unix ════════ wire ══════════ host ─▶ rpc ─▶ cpi
//! ```
//!
//! The same program is on both ends, so there is one contract and one set of verbs: the caller's end passes a request on and
//! an answer back, to the letter. The room knows how requests look, and nothing of what they do.

pub mod client;
mod forwarded_call;
pub mod group;
pub mod protocol;
mod replicate;
mod scheduler;
pub mod server;
pub mod single;
mod transport;
