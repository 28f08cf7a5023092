//! What a NIC needs from the host, worked out from the operator's [`config::Network`](crate::config::Network) and the
//! addresses a request brings. Pure: nothing here looks at the host.
//!
//! A further profile is a further way to fill a [`Segment`]: `routed` is `nat` that does not masquerade, `isolated`
//! is `nat` without addresses, `vlan` adds a tag to the port. User networking needs no segment at all.

use std::net::IpAddr;

use ipnetwork::{IpNetwork, ip_mask_to_prefix};

use crate::config::{Network, NetworkProfile};
use crate::error::{Error, ErrorKind, Result};
use crate::link_name::LinkName;
pub use crate::store::record::{Keeper, Segment};

/// The bridge of `nat` networks whose operator named none.
const DEFAULT_NAT_BRIDGE: &str = "bosh-nat0";
/// Largest packet of `nat` networks whose operator said nothing, bytes: Ethernet's.
const DEFAULT_NAT_MTU: u32 = 1500;
/// The widest subnets taken, IPv4 and IPv6. Anything wider is a slip that would draw the host's own traffic.
const WIDEST: (u8, u8) = (8, 32);

/// What a request says about one address of a NIC: the keys of the same names of a BOSH network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Requested {
    /// The VM's address.
    pub ip: Option<IpAddr>,
    /// The subnet's mask.
    pub netmask: Option<IpAddr>,
    /// The subnet's gateway.
    pub gateway: Option<IpAddr>,
}

/// The segment of the host network `name`, for a NIC that a request wants there.
///
/// # Errors
/// [`ErrorKind::BadConfig`] if the network can not be as the operator wrote it, [`ErrorKind::BadRequest`] if the
/// request does not fit it; both name what differs.
pub fn segment(name: &str, network: &Network, requested: &Requested) -> Result<Segment> {
    let bridge = network.bridge.as_deref();
    let mtu = network.mtu.map(|mtu| u32::try_from(mtu.get()).expect("at most 65535"));
    match network.profile {
        NetworkProfile::Nat => Ok(Segment {
            network: name.to_owned(),
            bridge: bridge_name(name, bridge.unwrap_or(DEFAULT_NAT_BRIDGE))?,
            mtu: Some(mtu.unwrap_or(DEFAULT_NAT_MTU)),
            keeper: Keeper::Us { addresses: vec![host_address(name, network, requested)?], masquerade: true },
        }),
        NetworkProfile::Bridge => {
            let bridge = bridge.ok_or_else(|| {
                bad_config(name, "has the profile 'bridge' and no bridge")
                    .hint(format!("set networks.{name}.bridge to a bridge of this host"))
            })?;
            if network.subnet.is_some() || network.gateway.is_some() {
                return Err(bad_config(name, "has the profile 'bridge', where subnet and gateway say nothing"));
            }
            Ok(Segment { mtu, ..operators(name, bridge_name(name, bridge)?) })
        }
    }
}

/// The segment of a bridge that a subnet's cloud properties name themselves: `{"bridge": "br0"}`.
///
/// # Errors
/// [`ErrorKind::BadRequest`] if that can be no bridge's name.
pub fn existing_bridge(bridge: &str) -> Result<Segment> {
    let name = LinkName::parse(bridge).map_err(|e| Error::new(ErrorKind::BadRequest, "bad bridge name").because(e))?;
    Ok(operators(bridge, name))
}

fn operators(network: &str, bridge: LinkName) -> Segment {
    Segment { network: network.to_owned(), bridge, mtu: None, keeper: Keeper::Operator }
}

/// The host's address on the bridge of a `nat` network, with the subnet's prefix.
fn host_address(name: &str, network: &Network, requested: &Requested) -> Result<IpNetwork> {
    let gateway = match (network.gateway, requested.gateway) {
        (Some(host), Some(asked)) if host != asked => {
            return Err(bad_request(name, &format!("has the gateway {host}, the request wants {asked}")));
        }
        (host, asked) => host.or(asked),
    };
    let host = match network.subnet {
        Some(subnet) => in_configured(name, subnet, network.gateway, gateway)?,
        None => in_requested(name, requested, gateway)?,
    };
    let widest = if host.is_ipv4() { WIDEST.0 } else { WIDEST.1 };
    if host.prefix() < widest {
        return Err(bad_request(name, &format!("can not be as wide as {host}: /{widest} is the widest")));
    }
    check_guest(name, host, requested)?;
    Ok(host)
}

/// With a subnet in the configuration: the gateway agreed on, else the subnet's first address.
fn in_configured(
    name: &str,
    subnet: IpNetwork,
    configured: Option<IpAddr>,
    gateway: Option<IpAddr>,
) -> Result<IpNetwork> {
    let first = subnet.iter().nth(1).unwrap_or_else(|| subnet.ip());
    let gateway = gateway.unwrap_or(first);
    if !subnet.contains(gateway) {
        return Err(match configured {
            Some(_) => bad_config(name, &format!("has the gateway {gateway}, which is not in its subnet {subnet}")),
            None => bad_request(name, &format!("has the subnet {subnet}, which the gateway {gateway} is not in")),
        });
    }
    Ok(with_prefix(gateway, subnet.prefix()))
}

/// Without: the request's gateway and netmask.
fn in_requested(name: &str, requested: &Requested, gateway: Option<IpAddr>) -> Result<IpNetwork> {
    let missing = |what: &str| {
        bad_request(name, &format!("has no subnet of its own, and the request brings no {what}"))
            .hint(format!("give the subnet in the manifest a gateway and a range, or set networks.{name}.subnet"))
    };
    let gateway = gateway.ok_or_else(|| missing("gateway"))?;
    let netmask = requested.netmask.ok_or_else(|| missing("netmask"))?;
    let prefix = ip_mask_to_prefix(netmask).ok().filter(|_| netmask.is_ipv4() == gateway.is_ipv4());
    let prefix =
        prefix.ok_or_else(|| bad_request(name, &format!("can not have netmask {netmask} and gateway {gateway}")))?;
    Ok(with_prefix(gateway, prefix))
}

/// The guest's address and mask must lie in the subnet, or it would look for its neighbours elsewhere.
fn check_guest(name: &str, host: IpNetwork, requested: &Requested) -> Result<()> {
    let subnet = with_prefix(host.network(), host.prefix());
    let Some(ip) = requested.ip else { return Ok(()) };
    if !subnet.contains(ip) {
        return Err(bad_request(name, &format!("has the subnet {subnet}, which the ip {ip} is not in")));
    }
    if ip == host.ip() {
        return Err(bad_request(name, &format!("has the gateway {ip}, which the request wants as the VM's ip")));
    }
    let Some(netmask) = requested.netmask else { return Ok(()) };
    let fits = netmask.is_ipv4() == ip.is_ipv4() && ip_mask_to_prefix(netmask).is_ok_and(|p| p >= subnet.prefix());
    if fits {
        return Ok(());
    }
    Err(bad_request(name, &format!("has the subnet {subnet}, which the netmask {netmask} of ip {ip} leaves")))
}

/// Whether two subnets share an address.
pub(super) fn overlap(one: IpNetwork, other: IpNetwork) -> bool {
    one.contains(other.network()) || other.contains(one.network())
}

fn with_prefix(ip: IpAddr, prefix: u8) -> IpNetwork {
    IpNetwork::new(ip, prefix).expect("a prefix taken from an address or mask of the same family")
}

fn bridge_name(network: &str, bridge: &str) -> Result<LinkName> {
    LinkName::parse(bridge).map_err(|e| bad_config(network, "has a bad bridge name").because(e))
}

fn bad_config(network: &str, problem: &str) -> Error {
    Error::new(ErrorKind::BadConfig, format!("host network '{network}' {problem}"))
}

fn bad_request(network: &str, problem: &str) -> Error {
    Error::new(ErrorKind::BadRequest, format!("host network '{network}' {problem}"))
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
