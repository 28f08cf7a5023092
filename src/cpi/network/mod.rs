//! Networks.

pub mod addresses;
pub mod host;
pub mod managed;
pub mod nics;
