//! bosh-qemu-cpi
#![cfg_attr(test, allow(missing_docs))]

pub mod cid;
pub mod config;
pub mod error;
pub mod net;
pub mod schema;
pub mod sys;
pub mod units;
