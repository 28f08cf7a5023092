//! Transports: how a call reaches a host. Each request has its own session, through ssh or a Unix
//! socket.
//!
//! ```text
//!   session ──► ssh ──► shared_connection   which ssh connection the session runs on
//!      │         └────► diagnosis           what a failed ssh means
//!      └──────► unix
//!               (all) ► channel             the bytes of a session, and how to close them
//! ```

mod channel;
mod diagnosis;
mod session;
mod shared_connection;
mod ssh;
mod unix;

pub use session::Session;
