//! One step towards what a segment needs. Its `Display` is what an operator would type.

use std::fmt;

use ipnetwork::IpNetwork;

use super::nft::Table;
use super::sysctl;
use crate::link_name::LinkName;
use crate::mac::MacAddress;
use crate::store::record::{Nic, Segment};

/// A change of the host's kernel state.
#[derive(Debug)]
pub enum Change {
    /// Makes a bridge, down, that neither delays nor filters and keeps its address whatever joins it.
    AddBridge {
        /// Its name.
        name: LinkName,
        /// Its own address.
        mac: MacAddress,
        /// Largest packet, bytes.
        mtu: u32,
    },
    /// Makes the sub-interface of a link for one of its VLANs.
    AddVlan {
        /// Its name.
        name: LinkName,
        /// The link that carries tagged packets.
        carrier: LinkName,
        /// The VLAN.
        vlan: u16,
    },
    /// Changes a link.
    SetLink {
        /// The link.
        link: LinkName,
        /// What of it.
        to: LinkSettings,
    },
    /// Keeps a port of a bridge from other such ports.
    IsolatePort(LinkName),
    /// Has a bridge know by itself who is behind a port, and learn nothing from what comes out of it: frames to some
    /// addresses teach it before any rule is asked (`net/bridge/br_input.c`).
    PinMac {
        /// The port.
        port: LinkName,
        /// Who is behind it.
        mac: MacAddress,
    },
    /// Puts a port of a bridge on one VLAN, untagged, and on no other.
    SetPortVlan {
        /// The port.
        port: LinkName,
        /// The VLAN.
        vlan: u16,
        /// The VLAN that the bridge gives every port.
        replaces: Option<u16>,
    },
    /// Adds an address, with its subnet's prefix.
    AddAddress {
        /// To this link.
        link: LinkName,
        /// The address.
        address: IpNetwork,
    },
    /// Adds the route to a link's own subnet, which the kernel made with the address and somebody removed.
    AddRoute {
        /// The link.
        link: LinkName,
        /// The link's address.
        address: IpNetwork,
    },
    /// Writes a setting below `/proc/sys/net`.
    WriteSysctl {
        /// Its path there.
        key: String,
        /// The value.
        value: &'static str,
    },
    /// Puts a table of ours in place.
    ReplaceTable(Ruleset),
}

/// What is to be a port of a bridge.
#[derive(Debug, Clone, PartialEq)]
pub struct Port {
    /// The link.
    pub link: LinkName,
    /// The only address behind it, if the machine there may have no other.
    pub pinned_mac: Option<MacAddress>,
}

impl From<LinkName> for Port {
    fn from(link: LinkName) -> Self {
        Self { link, pinned_mac: None }
    }
}

impl Port {
    /// The port of a VM's network card, if it has one, with the segment that it is on.
    pub fn of(nic: &Nic) -> Option<(Self, &Segment)> {
        let (tap, segment) = nic.tap()?;
        let guarded = nic.rules.as_ref().is_some_and(|rules| rules.anti_spoof);
        Some((Self { link: tap.clone(), pinned_mac: guarded.then_some(nic.mac) }, segment))
    }
}

/// An nftables table of ours.
#[derive(Debug)]
pub struct Ruleset(pub(super) Table);

/// What to change of a link. The kernel takes all of it in one message.
#[derive(Debug, Default, PartialEq)]
pub struct LinkSettings {
    /// Text for people.
    pub alias: Option<String>,
    /// Its Ethernet address.
    pub mac: Option<MacAddress>,
    /// Largest packet, bytes.
    pub mtu: Option<u32>,
    /// The bridge it is to be a port of.
    pub controller: Option<LinkName>,
    /// Switches it on; `false` leaves it.
    pub up: bool,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddBridge { name, mac, mtu } => {
                write!(
                    f,
                    "ip link add {name} address {mac} mtu {mtu} type bridge stp_state 0 forward_delay 0"
                )
            }
            Self::AddVlan { name, carrier, vlan } => {
                write!(f, "ip link add {name} link {carrier} type vlan id {vlan}")
            }
            Self::SetLink { link, to } => write!(f, "ip link set {link}{to}"),
            Self::IsolatePort(port) => write!(f, "bridge link set dev {port} isolated on"),
            Self::PinMac { port, mac } => {
                write!(f, "bridge link set dev {port} learning off && ")?;
                write!(f, "bridge fdb replace {mac} dev {port} master static sticky")
            }
            Self::SetPortVlan { port, vlan, replaces } => {
                write!(f, "bridge vlan add dev {port} vid {vlan} pvid untagged")?;
                replaces
                    .map_or(Ok(()), |other| write!(f, " && bridge vlan del dev {port} vid {other}"))
            }
            Self::AddAddress { link, address } => write!(f, "ip address add {address} dev {link}"),
            Self::AddRoute { link, address } => {
                let (network, prefix, source) = (address.network(), address.prefix(), address.ip());
                write!(
                    f,
                    "ip route add {network}/{prefix} dev {link} src {source} proto kernel scope link"
                )
            }
            Self::WriteSysctl { key, value } => {
                write!(f, "sysctl -w {}={value}", sysctl::name(key))
            }
            Self::ReplaceTable(Ruleset(table)) => write!(f, "nft {table}"),
        }
    }
}

impl fmt::Display for LinkSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { alias, mac, mtu, controller, up } = self;
        mac.map_or(Ok(()), |mac| write!(f, " address {mac}"))?;
        mtu.map_or(Ok(()), |mtu| write!(f, " mtu {mtu}"))?;
        controller.as_ref().map_or(Ok(()), |bridge| write!(f, " master {bridge}"))?;
        alias.as_ref().map_or(Ok(()), |alias| write!(f, " alias '{}'", alias.escape_debug()))?;
        f.write_str(if *up { " up" } else { "" })
    }
}
