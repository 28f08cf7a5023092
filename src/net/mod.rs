//! Host networking: which bridge a VM's NIC is plugged into, and everything on the host that makes the bridge work.
//!
//! ```text
//!   config::Network + profile + request        Segment, kept in the VM's record
//!            │                                    │
//!        plan (pure) ─────────────────────────▶ apply ── missing · ensure · plug · release
//!                                               │   │
//!             what is seen ▶ diff (pure) ▶ change   └ link (netlink) · tap · sysctl · nft
//!                              │
//!                              └ firewall (which rules)      kept: who keeps a bridge without VMs
//! ```
//! A [`plan::Segment`] says by itself what the host must have, so a supervisor can plug a VM in again years later,
//! whatever the configuration has become. The kernel's state is the only other memory: nothing here writes a file. `coexist` looks for
//! what other programs do to our VMs' packets.
//!
//! Everything is synchronous and opens its sockets on the calling thread, in whose network namespace it acts. Do not
//! call it from within an async runtime, but from `spawn_blocking`: `link` runs a small runtime of its own.
//!
//! This module knows links, addresses and rules. It knows nothing of VMs but their cid, nothing of BOSH's networks
//! but three addresses, and nothing of QEMU.

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

/// How the alias of every link that we made begins.
const ALIAS_PREFIX: &str = "bosh-qemu-cpi:";
/// Largest packet of plain Ethernet, bytes.
const ETHERNET_MTU: u32 = 1500;
const NEEDS_ROOT: &str = "run as root, or with CAP_NET_ADMIN";
