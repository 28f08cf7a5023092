//! Networks: NICs and addresses of VMs, bridges, profiles, VLANs, the packet filter.

mod addresses;
mod bridges;
mod command;
mod filter;
mod host_routes;
mod managed;
mod nics;
mod profiles;
mod vlans;
