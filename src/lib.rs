//! bosh-qemu-cpi
#![cfg_attr(test, allow(missing_docs))]

pub mod cid;
pub mod cli;
pub mod commands;
pub mod config;
pub mod cpi;
pub mod error;
pub mod log;
pub mod ordered;
pub mod rpc;
pub mod schema;
pub mod units;
