//! The host's address on a bridge: the gateway of its VMs, from the configuration or the request.

use std::net::IpAddr;

use ipnetwork::{IpNetwork, ip_mask_to_prefix};

use super::{Requested, bad_config, bad_request, with_prefix};
use crate::config::Network;
use crate::error::Result;

/// Shortest prefixes of a subnet, IPv4 and IPv6. A shorter one is a mistake that would draw the
/// host's own traffic.
const SHORTEST_PREFIXES: (u8, u8) = (8, 32);

/// Returns the host's address in the subnet, with the subnet's prefix.
pub(super) fn host_address(
    name: &str,
    network: &Network,
    requested: &Requested,
) -> Result<IpNetwork> {
    let gateway = match (network.gateway, requested.gateway) {
        (Some(host), Some(asked)) if host != asked => {
            return Err(bad_request(
                name,
                &format!("has the gateway {host}, the request wants {asked}"),
            ));
        }
        (host, asked) => host.or(asked),
    };
    let host = match network.subnet {
        Some(subnet) => in_configured_subnet(name, subnet, network.gateway, gateway)?,
        None => in_requested_subnet(name, requested, gateway)?,
    };
    let widest = if host.is_ipv4() { SHORTEST_PREFIXES.0 } else { SHORTEST_PREFIXES.1 };
    if host.prefix() < widest {
        return Err(bad_request(
            name,
            &format!("cannot be as wide as {host}: /{widest} is the widest"),
        ));
    }
    ensure_guest_fits(name, host, requested)?;
    Ok(host)
}

/// Returns the host's address in a configured subnet: the gateway of both sides, else the subnet's
/// first address.
fn in_configured_subnet(
    name: &str,
    subnet: IpNetwork,
    configured: Option<IpAddr>,
    gateway: Option<IpAddr>,
) -> Result<IpNetwork> {
    let first = subnet.iter().nth(1).unwrap_or_else(|| subnet.ip());
    let gateway = gateway.unwrap_or(first);
    if !subnet.contains(gateway) {
        return Err(match configured {
            Some(_) => bad_config(
                name,
                &format!("has the gateway {gateway}, which is not in its subnet {subnet}"),
            ),
            None => bad_request(
                name,
                &format!("has the subnet {subnet}, which the gateway {gateway} is not in"),
            ),
        });
    }
    Ok(with_prefix(gateway, subnet.prefix()))
}

/// Returns the host's address in a subnet that the request chooses: its gateway and netmask.
fn in_requested_subnet(
    name: &str,
    requested: &Requested,
    gateway: Option<IpAddr>,
) -> Result<IpNetwork> {
    let missing = |what: &str| {
        bad_request(name, &format!("has no subnet of its own, and the request has no {what}")).hint(
            format!(
                "give the subnet in the manifest a gateway and a range, \
                 or set networks.{name}.subnet"
            ),
        )
    };
    let gateway = gateway.ok_or_else(|| missing("gateway"))?;
    let netmask = requested.netmask.ok_or_else(|| missing("netmask"))?;
    let prefix = ip_mask_to_prefix(netmask).ok().filter(|_| netmask.is_ipv4() == gateway.is_ipv4());
    let prefix = prefix.ok_or_else(|| {
        bad_request(name, &format!("cannot have netmask {netmask} and gateway {gateway}"))
    })?;
    Ok(with_prefix(gateway, prefix))
}

/// Ensures that the guest's address and mask lie in the subnet. With a wider mask, the guest would
/// look for other machines on the wrong link.
fn ensure_guest_fits(name: &str, host: IpNetwork, requested: &Requested) -> Result<()> {
    let subnet = with_prefix(host.network(), host.prefix());
    let Some(ip) = requested.ip else { return Ok(()) };
    if !subnet.contains(ip) {
        return Err(bad_request(
            name,
            &format!("has the subnet {subnet}, which the ip {ip} is not in"),
        ));
    }
    if ip == host.ip() {
        return Err(bad_request(
            name,
            &format!("has the gateway {ip}, which the request wants as the VM's ip"),
        ));
    }
    let Some(netmask) = requested.netmask else { return Ok(()) };
    let fits = netmask.is_ipv4() == ip.is_ipv4()
        && ip_mask_to_prefix(netmask).is_ok_and(|p| p >= subnet.prefix());
    if fits {
        return Ok(());
    }
    Err(bad_request(
        name,
        &format!("has the subnet {subnet}, which the netmask {netmask} of ip {ip} exceeds"),
    ))
}
