//! The contract as the Director and bosh-cli use it: requests, recorded flows, upgrades.

mod light_stemcells;
pub mod recorded_flows;
mod requests;
mod upgrade;
