//! bosh-qemu-cpi
pub mod cid;
pub mod config;
pub mod error;
pub mod host;
pub mod image;
pub mod link_name;
pub mod mac;
pub mod net;
pub mod qemu;
pub mod schema;
pub mod store;
pub mod sys;
pub mod units;
