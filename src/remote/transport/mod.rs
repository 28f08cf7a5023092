//! The ways a call reaches a host: one session for each request, through ssh or a socket.

mod control_path;
mod session;
mod ssh;
mod unix;

pub use session::Session;
