//! bosh-qemu-cpi
#![cfg_attr(test, allow(missing_docs))]

pub mod cid;
pub mod config;
pub mod error;
pub mod image;
pub mod schema;
pub mod units;
