//! Host networking: the bridge of each NIC, and the addresses, routes and rules that make it work.
//!
//! ```text
//!   config::Network + profile + request        Segment, stored in the VM's record
//!            │                                    │
//!        plan (pure) ─────────────────────────▶ apply ── ensure · plug · release
//!                                               │   │
//!          Observed state ▶ diff (pure) ▶ change    └ link (netlink) · tap · sysctl · nft
//!                              │
//!                              └ firewall (a bridge's rules)
//!
//!   bridge_owners     state directories that keep a bridge without VMs
//!   filter            what a VM may send and receive
//!   host_firewalls    what other programs do to VM packets
//!   probe             whether another machine has an address
//!   subnet_conflict   whether a requested subnet is free on this host
//! ```
//! A [`plan::Segment`] describes everything the host must have. A supervisor can therefore plug a
//! VM in again years later, whatever the configuration is then. The kernel holds the only other
//! state: this module writes no file.
//!
//! Every function is synchronous and opens its sockets on the calling thread, in that thread's
//! network namespace. Async code must call it through `spawn_blocking`: `link` runs a small runtime
//! of its own.
//!
//! This module knows links, addresses and rules. Of a VM it knows only the cid, of a BOSH network
//! only three addresses, and of QEMU nothing.

pub mod apply;
pub mod bridge_owners;
pub mod change;
mod diff;
pub mod filter;
mod firewall;
pub mod host_firewalls;
mod link;
mod nft;
pub mod plan;
pub mod probe;
pub mod profile;
pub mod subnet_conflict;
mod sysctl;
pub mod tap;

/// Prefix of the alias of every bridge that the CPI makes.
const ALIAS_PREFIX: &str = "bosh-qemu-cpi:";
/// Largest packet of plain Ethernet, bytes.
const ETHERNET_MTU: u32 = 1500;
const NEEDS_ROOT: &str = "run as root, or with CAP_NET_ADMIN";
