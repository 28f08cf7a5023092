//! The contract as the Director and bosh-cli use it: requests, recorded flows, upgrades.

pub mod recorded_flows;
mod requests;
mod upgrade;
