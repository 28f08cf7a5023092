//! The making of objects.

pub mod cancellation;
