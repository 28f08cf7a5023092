//! bosh-qemu-cpi
#![cfg_attr(test, allow(missing_docs))]

pub mod cid;
pub mod config;
pub mod error;
pub mod qemu;
pub mod schema;
pub mod store;
pub mod units;
