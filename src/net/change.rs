//! One change of the host's network towards what a segment needs. `Display` shows the command an
//! operator would type, and for a table its text in nft's syntax.

use std::fmt;

use ipnetwork::IpNetwork;

use super::nft::Table;
use super::sysctl;
use crate::link_name::LinkName;
use crate::mac::MacAddress;
use crate::store::record::{Nic, Segment};
use crate::sys::tun::Framing;

/// A change of the host's kernel state.
#[derive(Debug)]
pub enum Change {
    /// Makes a bridge, down, without STP and forwarding delay. Its MAC address stays the same
    /// whichever port joins.
    AddBridge {
        /// The bridge's name.
        name: LinkName,
        /// The bridge's own MAC address.
        mac: MacAddress,
        /// Largest packet, bytes.
        mtu: u32,
    },
    /// Makes a VLAN sub-interface of a link.
    AddVlan {
        /// The sub-interface's name.
        name: LinkName,
        /// The link that carries the tagged packets.
        carrier: LinkName,
        /// The VLAN's number.
        vlan: u16,
    },
    /// Changes settings of a link.
    SetLink {
        /// The link.
        link: LinkName,
        /// The settings to change.
        to: LinkSettings,
    },
    /// Isolates a bridge port: it exchanges no frames with other isolated ports.
    IsolatePort(LinkName),
    /// Gives a bridge port a static forwarding entry, switches its MAC learning off, and lets no
    /// frame past the rules. Frames to a bridge's group addresses (01:80:c2:00:00:00 to 0f) teach
    /// the bridge and reach the host before the bridge consults any rule, unless the port forwards
    /// them (`net/bridge/br_input.c`).
    PinMac {
        /// The port.
        port: LinkName,
        /// The only MAC address behind the port.
        mac: MacAddress,
    },
    /// Puts a bridge port on one VLAN, untagged, and takes it off the bridge's default VLAN.
    SetPortVlan {
        /// The port.
        port: LinkName,
        /// The VLAN's number.
        vlan: u16,
        /// The VLAN the bridge gives every new port, if it differs from `vlan`.
        replaces: Option<u16>,
    },
    /// Adds an IP address to a link.
    AddAddress {
        /// The link.
        link: LinkName,
        /// The address, with its subnet's prefix.
        address: IpNetwork,
    },
    /// Adds the route to a link's own subnet. The kernel made it with the address, and another
    /// program removed it.
    AddRoute {
        /// The link.
        link: LinkName,
        /// The link's address, with its subnet's prefix.
        address: IpNetwork,
    },
    /// Writes a kernel setting below `/proc/sys/net`.
    WriteSysctl {
        /// Path below `/proc/sys/net`.
        key: String,
        /// The value to write.
        value: &'static str,
        /// Whether the network fails without it.
        required: bool,
    },
    /// Replaces one of the CPI's nftables tables as a whole.
    ReplaceTable(Ruleset),
}

/// Mask of the bridge group addresses that a port can forward: all but 01:80:c2:00:00:01, frames
/// to which every bridge drops.
pub(super) const ALL_GROUP_ADDRESSES: u16 = 0xfffd;

/// A link that is to be a port of a bridge.
#[derive(Debug, Clone, PartialEq)]
pub struct Port {
    /// The link.
    pub link: LinkName,
    /// The only MAC address allowed behind the port; `None` leaves the port learning.
    pub pinned_mac: Option<MacAddress>,
    /// How the tap carries frames. A virtio-net header names two bytes of its frame that the host
    /// overwrites with a checksum when the frame leaves it. That is after the filter has read the
    /// frame, so a guest could forge what the filter checks.
    pub framing: Framing,
}

impl From<LinkName> for Port {
    fn from(link: LinkName) -> Self {
        Self { link, pinned_mac: None, framing: Framing::VirtioHeader }
    }
}

impl Port {
    /// Returns the port of a VM's NIC and its segment, or `None` for a NIC without a tap.
    pub fn of(nic: &Nic) -> Option<(Self, &Segment)> {
        let (tap, segment) = nic.tap()?;
        let guard = nic.rules.as_ref().filter(|rules| rules.anti_spoof);
        let framing = match guard {
            Some(rules) if !rules.offload => Framing::Plain,
            _ => Framing::VirtioHeader,
        };
        let pinned_mac = guard.map(|_| nic.mac);
        Some((Self { link: tap.clone(), pinned_mac, framing }, segment))
    }
}

/// An nftables table of the CPI.
#[derive(Debug)]
pub struct Ruleset(pub(super) Table);

/// Settings of a link to change. The kernel takes all of them in one message.
#[derive(Debug, Default, PartialEq)]
pub struct LinkSettings {
    /// The link's alias.
    pub alias: Option<String>,
    /// The link's MAC address.
    pub mac: Option<MacAddress>,
    /// Largest packet, bytes.
    pub mtu: Option<u32>,
    /// The bridge the link is to join.
    pub controller: Option<LinkName>,
    /// Whether to switch the link on; `false` changes nothing.
    pub up: bool,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddBridge { name, mac, mtu } => {
                write!(
                    f,
                    "ip link add {name} address {mac} mtu {mtu} \
                     type bridge stp_state 0 forward_delay 0"
                )
            }
            Self::AddVlan { name, carrier, vlan } => {
                write!(f, "ip link add {name} link {carrier} type vlan id {vlan}")
            }
            Self::SetLink { link, to } => write!(f, "ip link set {link}{to}"),
            Self::IsolatePort(port) => write!(f, "bridge link set dev {port} isolated on"),
            Self::PinMac { port, mac } => {
                write!(
                    f,
                    "ip link set {port} type bridge_slave learning off \
                     group_fwd_mask {ALL_GROUP_ADDRESSES:#x} && "
                )?;
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
                    "ip route add {network}/{prefix} dev {link} src {source} \
                     proto kernel scope link"
                )
            }
            Self::WriteSysctl { key, value, .. } => {
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
