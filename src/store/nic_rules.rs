//! The part of a VM's record that says what each of its network cards may send, and what reaches it.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

/// What a network card may send, and what reaches it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicRules {
    /// Whether it may send only as itself: from its MAC and its addresses.
    pub anti_spoof: bool,
    /// Its addresses, each with the length of the block that is its own. None: somebody else's DHCP server decides.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpNetwork>,
    /// Further addresses it may send from; others may have them, too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allowed: Vec<IpNetwork>,
    /// Who may begin to speak to it; absent: everybody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admits: Option<Vec<Admission>>,
    /// Ports of the host that lead to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forwards: Vec<Forward>,
    /// Whether its addresses are looked for on the wire before it boots.
    #[serde(default)]
    pub probe: bool,
}

/// Who may begin to speak to a VM, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admission {
    /// From where.
    pub source: IpNetwork,
    /// By which protocols of IP, first and last number.
    pub protocols: (u8, u8),
    /// To which ports, first and last; absent: whatever is of the protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<(u16, u16)>,
}

/// Ports of the host that lead to a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    /// The host's address; absent: every one of the family of `to`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// TCP or UDP, by its number.
    pub protocol: u8,
    /// First port of the host.
    pub host: u16,
    /// The VM's address.
    pub to: IpAddr,
    /// First port of the VM.
    pub guest: u16,
    /// How many ports, one after the other.
    pub count: u16,
}
