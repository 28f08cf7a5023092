//! What a VM is wired to, and managed networks.

use std::net::Ipv4Addr;

use ipnetwork::{IpNetwork, Ipv4Network};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Phase;
use crate::cid::NetworkCid;
use crate::link_name::LinkName;
use crate::mac::MacAddress;
use crate::store::nic_rules::NicRules;

/// A managed network: one that the Director had made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// Layout version.
    pub schema: u32,
    /// Its cid.
    pub cid: NetworkCid,
    /// Where it is in its life.
    pub phase: Phase,
    /// When it was created, UTC.
    pub created_at: String,
    /// The uuid of the Director that had it made. Absent in records of versions that did not ask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub director: Option<String>,
    /// The network as the configuration would have it.
    pub settings: Map<String, Value>,
    /// Fields of a newer version.
    #[serde(flatten)]
    pub newer: Map<String, Value>,
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// The manifest's name of the network.
    pub network: String,
    /// Its address.
    pub mac: MacAddress,
    /// Its other end.
    #[serde(flatten)]
    pub wire: Wire,
    /// What it may send, and what reaches it. Absent in records of versions that knew no such rules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rules: Option<NicRules>,
}

impl Nic {
    /// The tap and what it is plugged into, if it has one.
    pub fn tap(&self) -> Option<(&LinkName, &Segment)> {
        match &self.wire {
            Wire::Tap { tap, segment } => Some((tap, segment)),
            Wire::User { .. } => None,
        }
    }
}

/// What a network card is wired to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Wire {
    /// A bridge of the host.
    Tap {
        /// The tap's name on the host.
        tap: LinkName,
        /// What the tap is plugged into.
        segment: Segment,
    },
    /// QEMU's own network stack.
    User {
        /// How it is set up.
        user: UserNetwork,
    },
}

/// QEMU's user networking: a router inside the QEMU process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNetwork {
    /// The network's name in the configuration.
    pub network: String,
    /// The router's address, with the subnet's prefix, at most 29.
    pub gateway: Ipv4Network,
    /// The guest's address.
    pub guest: Ipv4Addr,
}

/// A bridge and what it takes for VMs on it to be reached. Stored in the VM's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// The network's name in the configuration, for messages and for people who look at the host.
    pub network: String,
    /// The Linux bridge.
    pub bridge: LinkName,
    /// Largest packet, bytes; absent: what the bridge has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The VLAN that VMs are on, untagged, where the bridge tells VLANs apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// Whether VMs on it are kept from each other.
    #[serde(default, skip_serializing_if = "is_false")]
    pub isolated: bool,
    /// Who makes the bridge.
    pub keeper: Keeper,
}

/// Who makes a bridge, and unmakes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keeper {
    /// The operator. It must be there, and nothing of it is ever changed.
    Operator,
    /// We do, with the first VM on it, and remove it with the last.
    #[serde(rename = "us")]
    Cpi {
        /// The host's addresses on the bridge, each with its subnet's prefix.
        addresses: Vec<IpNetwork>,
        /// Whether VMs reach the world under the host's own address.
        masquerade: bool,
        /// Ports of the host itself that VMs may use, by protocol and port. Absent: all, as records of older versions.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        services: Option<Vec<(u8, u16)>>,
        /// Whether the host passes nothing on between the bridge and its other links.
        #[serde(default, skip_serializing_if = "is_false")]
        closed: bool,
        /// The VLAN of another link that the bridge is part of.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        uplink: Option<VlanLink>,
    },
}

/// A VLAN of a link, which has a sub-interface of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VlanLink {
    /// The link that carries tagged packets.
    pub link: LinkName,
    /// The VLAN, 1 to 4094.
    pub vlan: u16,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_false(value: &bool) -> bool {
    !value
}
