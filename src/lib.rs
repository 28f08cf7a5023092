//! A BOSH Cloud Provider Interface that runs VMs on bare KVM hosts by launching and supervising
//! QEMU itself.
//!
//! ```text
//!              commands  cli
//!                     │
//!      remote ─► rpc  │  audit
//!                 └─► cpi ─► supervisor
//!                      │         │
//!              agent image qemu qmp net
//!                      │         │
//!                    store    host
//!                      │
//!     config schema cid digest ranges units mac link_name ordered blocking_call
//!     error log crash sys
//! ```
//!
//! Arrows point down only. ARCHITECTURE.md says what each module owns and follows one create_vm
//! through them.

pub mod agent;
pub mod audit;
pub mod blocking_call;
pub mod cid;
pub mod cli;
pub mod commands;
pub mod config;
pub mod cpi;
pub mod crash;
pub mod digest;
pub mod error;
pub mod host;
pub mod image;
pub mod link_name;
pub mod log;
pub mod mac;
pub mod net;
pub mod ordered;
pub mod qemu;
pub mod qmp;
pub mod ranges;
pub mod remote;
pub mod rpc;
pub mod schema;
pub mod store;
pub mod supervisor;
pub mod sys;
pub mod units;
