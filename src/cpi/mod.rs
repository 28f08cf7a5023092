//! The verbs of the CPI.

pub mod networks;
pub mod verbs;
