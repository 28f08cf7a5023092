//! Traffic rules of a network card, in its VM's record: what the VM may send, and what may reach
//! it.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

/// Traffic rules of one network card.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicRules {
    /// Whether the VM may send only from its own MAC and addresses.
    pub anti_spoof: bool,
    /// With `anti_spoof`: whether the VM may still leave checksums and segments to the host.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub offload: bool,
    /// Its addresses, each with the prefix length of its own block. Empty: an external DHCP server
    /// assigns them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpNetwork>,
    /// Further addresses that the VM may send from. Other VMs may have them, too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allowed: Vec<IpNetwork>,
    /// Peers that may open connections to the VM; absent: every peer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admits: Option<Vec<Admission>>,
    /// Ports of the host that are forwarded to the VM.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forwards: Vec<Forward>,
    /// Whether the supervisor probes the wire for its addresses (ARP, neighbour discovery) before
    /// the VM boots.
    #[serde(default)]
    pub probe: bool,
}

/// One rule for new connections to a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admission {
    /// Source addresses.
    pub source: IpNetwork,
    /// IP protocol numbers, first and last.
    pub protocols: (u8, u8),
    /// Destination ports, first and last; absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<(u16, u16)>,
}

/// Ports of the host that are forwarded to a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    /// The host's address; absent: all its addresses of the family of `to`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// IP protocol number: 6 (TCP) or 17 (UDP).
    pub protocol: u8,
    /// First port of the host.
    pub host: u16,
    /// The VM's address.
    pub to: IpAddr,
    /// First port of the VM.
    pub guest: u16,
    /// Number of consecutive ports.
    pub count: u16,
}
