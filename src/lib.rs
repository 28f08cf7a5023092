//! bosh-qemu-cpi
#![cfg_attr(test, allow(missing_docs))]

pub mod cid;
pub mod config;
pub mod error;
pub mod qmp;
pub mod schema;
pub mod units;
