//! Calls that another machine executes, and the group of hosts behind one Director.
//!
//! ```text
//!   Director, bosh CLI                                                     the host
//!     │ request                                                               ▲ request
//!     ▼                                                                       │
//!   rpc ─▶ single │ group ─▶ forwarded_call ─▶ client ─▶ transport ═══════ server ─▶ rpc ─▶ cpi
//!                   │                                    ssh │ unix
//!                   ├─▶ scheduler    the host for a new VM
//!                   ├─▶ replicate    stemcells, on all hosts
//!                   └─▶ members      requests to all hosts at the same time
//! ```
//!
//! The same program runs on both ends: one contract, one set of verbs. The client forwards the
//! request and returns the answer byte for byte. This module knows the shape of requests, and not
//! how a verb works.

pub mod client;
mod forwarded_call;
pub mod group;
mod members;
pub mod protocol;
mod replicate;
mod scheduler;
pub mod server;
pub mod single;
mod transport;
