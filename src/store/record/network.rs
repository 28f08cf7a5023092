//! Records of network cards, the bridges they are on, and managed networks.

use std::net::Ipv4Addr;

use ipnetwork::{IpNetwork, Ipv4Network};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Phase, Record};
use crate::cid::{Cid, NetworkCid};
use crate::link_name::LinkName;
use crate::mac::MacAddress;
use crate::store::Rank;
use crate::store::nic_rules::NicRules;

/// A managed network, created by create_network.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// Version of the layout.
    pub schema: u32,
    /// Its cid.
    pub cid: NetworkCid,
    /// Its phase.
    pub phase: Phase,
    /// Time of its creation, UTC.
    pub created_at: String,
    /// The uuid of the Director that created it. Absent in records of old versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub director: Option<String>,
    /// The network in the form of an entry of `networks` in the configuration.
    pub settings: Map<String, Value>,
    /// Fields that a newer version added.
    #[serde(flatten)]
    pub newer: Map<String, Value>,
}

impl NetworkRecord {
    /// The name of the network's bridge: `bosh-` and the first ten characters of the cid's random
    /// part. A link's name has at most 15 characters (`IFNAMSIZ`).
    pub fn bridge(cid: &NetworkCid) -> String {
        let tail = cid.as_str().rsplit('-').next().unwrap_or_default();
        format!("bosh-{}", &tail[..tail.len().min(10)])
    }
}

impl Record for NetworkRecord {
    type Cid = NetworkCid;

    const RANK: Rank = Rank::Network;

    const LOCK_IS_SHORT: bool = true;

    /// The lock of its bridge, which VMs on the network take, too.
    fn lock_name(cid: &NetworkCid) -> String {
        Self::bridge(cid)
    }

    fn cid(&self) -> &NetworkCid {
        &self.cid
    }

    fn phase(&self) -> Phase {
        self.phase
    }

    fn set_phase(&mut self, phase: Phase) {
        self.phase = phase;
    }
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Name of the network in the manifest.
    pub network: String,
    /// Its MAC address.
    pub mac: MacAddress,
    /// Its connection to the host.
    #[serde(flatten)]
    pub wire: Wire,
    /// Its traffic rules. Absent in records of old versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rules: Option<NicRules>,
}

impl Nic {
    /// Its tap and the tap's segment, if it has a tap.
    pub fn tap(&self) -> Option<(&LinkName, &Segment)> {
        match &self.wire {
            Wire::Tap { tap, segment } => Some((tap, segment)),
            Wire::User { .. } => None,
        }
    }
}

/// Connection of a network card to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Wire {
    /// A tap on a bridge of the host.
    Tap {
        /// Name of the tap.
        tap: LinkName,
        /// Segment of the tap.
        segment: Segment,
    },
    /// QEMU's user networking.
    User {
        /// Its settings.
        user: UserNetwork,
    },
}

/// QEMU's user networking: a router inside the QEMU process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNetwork {
    /// Name of the network in the configuration.
    pub network: String,
    /// The router's address, with the prefix length of the subnet, at most 29.
    pub gateway: Ipv4Network,
    /// The guest's address.
    pub guest: Ipv4Addr,
}

/// A bridge with the settings that VMs on it need. Part of each such VM's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Name of the network in the configuration, for messages and for link aliases.
    pub network: String,
    /// The Linux bridge.
    pub bridge: LinkName,
    /// MTU, bytes; absent: that of the bridge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// VLAN of the VMs, untagged at their taps, if the bridge filters VLANs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// Whether VMs on it cannot reach each other.
    #[serde(default, skip_serializing_if = "is_false")]
    pub isolated: bool,
    /// Maker of the bridge.
    pub keeper: Keeper,
}

/// Maker of a bridge, which also removes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keeper {
    /// The operator. The bridge must exist, and the CPI never changes it.
    Operator,
    /// The CPI, with the first VM on the bridge. It removes the bridge with the last one.
    #[serde(rename = "us")]
    Cpi {
        /// The host's addresses on the bridge, each with the prefix length of its subnet.
        addresses: Vec<IpNetwork>,
        /// Whether the host masquerades the VMs' traffic to other networks.
        masquerade: bool,
        /// Ports of the host that VMs may use, as protocol number and port. Absent: all, in records
        /// of old versions.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        services: Option<Vec<(u8, u16)>>,
        /// Whether the host forwards nothing between the bridge and its other links.
        #[serde(default, skip_serializing_if = "is_false")]
        closed: bool,
        /// VLAN of a link, whose sub-interface is a port of the bridge.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        uplink: Option<VlanLink>,
    },
}

/// A VLAN of a link, with a sub-interface of the link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VlanLink {
    /// The link with tagged packets.
    pub link: LinkName,
    /// The VLAN, 1 to 4094.
    pub vlan: u16,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_false(value: &bool) -> bool {
    !value
}
