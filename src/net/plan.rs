//! What a NIC needs from the host, worked out from the operator's [`config::Network`](crate::config::Network), its
//! [`Profile`] and the addresses a request brings. Pure: nothing here looks at the host.

use std::net::{IpAddr, Ipv4Addr};

use ipnetwork::{IpNetwork, Ipv4Network, ip_mask_to_prefix};

use super::profile::{Profile, Wiring};
use crate::config::{Mtu, Network};
use crate::error::{Error, ErrorKind, Result};
use crate::link_name::LinkName;
use crate::ranges::AddressRange;
pub use crate::store::record::{Keeper, Segment};
use crate::store::record::{UserNetwork, VlanLink};

/// The widest subnets taken, IPv4 and IPv6. Anything wider is a slip that would draw the host's own traffic.
const WIDEST: (u8, u8) = (8, 32);

/// Addresses that mean something else on every site (RFC 1918, 6598, 4193), or nothing (RFC 2544, 5737, 3849). Whoever has
/// any other one has it from the world.
const PRIVATE: [&str; 10] = [
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "198.18.0.0/15",
    "192.0.2.0/24",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "fc00::/7",
    "2001:db8::/32",
];

/// What a request says about one NIC: the keys of the same names of a BOSH network and its cloud properties.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Requested {
    /// The VM's address.
    pub ip: Option<IpAddr>,
    /// The subnet's mask.
    pub netmask: Option<IpAddr>,
    /// The subnet's gateway.
    pub gateway: Option<IpAddr>,
    /// The VLAN.
    pub vlan: Option<u16>,
}

/// What a NIC is to be wired to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A bridge, with a tap.
    Bridge(Segment),
    /// QEMU's own network stack.
    User(UserNetwork),
}

/// Where a NIC is that a request wants on the host network `name`.
///
/// # Errors
/// [`ErrorKind::BadConfig`] if the network can not be as the operator wrote it, [`ErrorKind::BadRequest`] if the
/// request does not fit it; both name what differs.
pub fn place(
    name: &str,
    network: &Network,
    profile: &Profile,
    requested: &Requested,
) -> Result<Place> {
    check_keys(name, network, profile)?;
    let vlan = vlan(name, network, profile, requested.vlan)?;
    if profile.wire == Wiring::User {
        return user(name, network, requested).map(Place::User);
    }
    let addresses =
        if profile.gateway { vec![host_address(name, network, requested)?] } else { Vec::new() };
    if let Some(address) =
        addresses.first().filter(|address| network.subnet.is_none() && !is_private(**address))
    {
        let problem = format!(
            "can not have {}, which the request chose: it is no private subnet",
            subnet(*address)
        );
        let hint = format!("if its addresses are yours to give, set networks.{name}.subnet");
        return Err(bad_request(name, &problem).hint(hint));
    }
    segment(name, network, profile, vlan, addresses).map(Place::Bridge)
}

/// Whether all addresses of the subnet are private ones.
pub fn is_private(subnet: IpNetwork) -> bool {
    PRIVATE.iter().any(|text| lies_in(subnet, text.parse().expect("a subnet")))
}

/// QEMU forwards ports to IPv4 addresses only (10.0: "Bad host address"), and has three addresses of the subnet besides the
/// guest's: its own, that of a name server, and the subnet's broadcast.
fn user(name: &str, network: &Network, requested: &Requested) -> Result<UserNetwork> {
    let given = [
        requested.ip,
        requested.gateway,
        network.gateway,
        network.subnet.map(|subnet| subnet.ip()),
    ];
    let gateway = if given.iter().all(Option::is_none) {
        // QEMU's own (`net/slirp.c`).
        Ipv4Network::new(Ipv4Addr::new(10, 0, 2, 2), 24).expect("a prefix of IPv4").into()
    } else {
        host_address(name, network, requested)?
    };
    let IpNetwork::V4(gateway) = gateway else {
        return Err(bad_request(name, "has the profile 'user', which is IPv4 only"));
    };
    if gateway.prefix() > 29 {
        return Err(bad_request(
            name,
            &format!("can not be as narrow as {gateway}: /29 is the narrowest"),
        ));
    }
    let guest = match requested.ip {
        Some(IpAddr::V4(guest)) => guest,
        Some(IpAddr::V6(_)) => unreachable!("it lies in the gateway's subnet"),
        None => chosen_guest(name, network, gateway)?,
    };
    Ok(UserNetwork { network: name.to_owned(), gateway, guest })
}

/// The address of a guest that nobody chose one for. Each is alone with its router, so all may have the same: the first that
/// QEMU would lease (`slirp_init`), or else the first of the pool.
fn chosen_guest(name: &str, network: &Network, gateway: Ipv4Network) -> Result<Ipv4Addr> {
    let pool = pool(name, network, gateway.into())?;
    let usable = |ip: &Ipv4Addr| {
        let taken = [gateway.network(), gateway.ip(), gateway.broadcast()].contains(ip);
        pool.contains(IpAddr::V4(*ip)) && !taken
    };
    let lease = Ipv4Addr::from(u32::from(gateway.network()).saturating_add(15));
    let v4 = |ip| if let IpAddr::V4(ip) = ip { Some(ip) } else { None };
    let found = [lease].into_iter().chain(pool.addresses().filter_map(v4)).find(usable);
    found.ok_or_else(|| bad_config(name, "has a pool without an address for a VM"))
}

/// Where addresses of networks of type `dynamic` come from, in `subnet`.
///
/// # Errors
/// [`ErrorKind::BadConfig`] if the configured pool lies elsewhere.
pub fn pool(name: &str, network: &Network, subnet: IpNetwork) -> Result<AddressRange> {
    let Some(pool) = network.pool else {
        return Ok(AddressRange { first: subnet.network(), last: subnet.broadcast() });
    };
    if subnet.contains(pool.first) && subnet.contains(pool.last) {
        return Ok(pool);
    }
    let problem = format!("has a pool that is not in its subnet {}", self::subnet(subnet));
    Err(bad_config(name, &problem)
        .hint(format!("set networks.{name}.pool to addresses of the subnet")))
}

/// What there is of the host network `name` without any VM: `None` if nothing, or if only requests tell what.
///
/// # Errors
/// [`ErrorKind::BadConfig`] as [`place`].
pub fn standing(name: &str, network: &Network, profile: &Profile) -> Result<Option<Segment>> {
    check_keys(name, network, profile)?;
    let vlan = network.vlan.map(number);
    if profile.wire == Wiring::User || profile.wire == Wiring::Vlan && vlan.is_none() {
        return Ok(None);
    }
    let addresses = match network.subnet {
        Some(_) if profile.gateway => vec![host_address(name, network, &Requested::default())?],
        _ => Vec::new(),
    };
    segment(name, network, profile, vlan, addresses).map(Some)
}

/// Adds to `one` what `other` wants of the same bridge, if both can be had: manifests with several subnets, and networks
/// of both IP versions, share bridges.
///
/// # Errors
/// [`ErrorKind::BadConfig`] naming both networks.
pub fn merge(one: &mut Segment, other: &Segment) -> Result<()> {
    let disagree = || {
        let (a, b, bridge) = (&one.network, &other.network, &one.bridge);
        let problem = format!(
            "bridge '{bridge}' can not be what both network '{a}' and network '{b}' want of it"
        );
        Error::new(ErrorKind::BadConfig, problem)
            .hint("name another bridge for one of them; a VM keeps the network it was made with")
    };
    match (&mut one.keeper, &other.keeper) {
        (Keeper::Operator, Keeper::Operator) => Ok(()),
        (
            Keeper::Cpi { addresses, masquerade, services, closed, uplink },
            Keeper::Cpi { addresses: more, masquerade: m, services: s, closed: c, uplink: u },
        ) if (&*masquerade, &*closed, &*uplink) == (m, c, u)
            && one.mtu.zip(other.mtu).is_none_or(|(mine, its)| mine == its) =>
        {
            let new: Vec<_> =
                more.iter().filter(|address| !addresses.contains(address)).copied().collect();
            addresses.extend(new);
            // Records that know nothing of services have no say; of others, each VM keeps what it was made with.
            if let Some(more) = s {
                let known = services.get_or_insert_default();
                known.extend(more);
                known.sort_unstable();
                known.dedup();
            }
            one.mtu = one.mtu.or(other.mtu);
            Ok(())
        }
        _ => Err(disagree()),
    }
}

/// The segment of a bridge that a subnet's cloud properties name themselves: `{"bridge": "br0"}`.
pub fn existing_bridge(bridge: &LinkName, vlan: Option<u16>, mtu: Option<u32>) -> Segment {
    let (network, bridge) = (bridge.to_string(), bridge.clone());
    Segment { network, bridge, mtu, vlan, isolated: false, keeper: Keeper::Operator }
}

fn segment(
    name: &str,
    network: &Network,
    profile: &Profile,
    vlan: Option<u16>,
    addresses: Vec<IpNetwork>,
) -> Result<Segment> {
    let uplink = network.uplink.clone().zip(vlan).map(|(link, vlan)| VlanLink { link, vlan });
    let named = network.bridge.as_ref().or(profile.bridge.as_ref());
    let bridge = match (named, &uplink) {
        (Some(bridge), _) => bridge.clone(),
        // One bridge for each VLAN; that two uplinks with one VLAN need two names is found in the kernel's state.
        (None, Some(uplink)) => {
            LinkName::parse(&format!("bosh-vlan{}", uplink.vlan)).expect("13 characters")
        }
        (None, None) => {
            let problem = format!("has the profile '{}' and no bridge", network.profile);
            let hint = format!("set networks.{name}.bridge to a bridge of this host");
            return Err(bad_config(name, &problem).hint(hint));
        }
    };
    let ours = profile.wire == Wiring::OwnBridge || uplink.is_some();
    Ok(Segment {
        network: name.to_owned(),
        bridge,
        mtu: network.mtu.map(bytes),
        // A sub-interface takes the tags off.
        vlan: if uplink.is_some() { None } else { vlan },
        isolated: !profile.neighbours,
        keeper: if ours {
            let closed = profile.wire == Wiring::OwnBridge && !profile.forward;
            let services = network
                .host_services
                .iter()
                .map(|port| (port.protocol.number(), port.port))
                .collect();
            // On a VLAN the host is a machine like others.
            let services = (profile.wire == Wiring::OwnBridge).then_some(services);
            Keeper::Cpi { addresses, masquerade: profile.masquerade, services, closed, uplink }
        } else {
            Keeper::Operator
        },
    })
}

/// A key that says nothing in this profile is a misunderstanding.
fn check_keys(name: &str, network: &Network, profile: &Profile) -> Result<()> {
    let addressed = profile.gateway || profile.wire == Wiring::User || network.pool.is_some();
    let useless = [
        ("subnet", network.subnet.is_some() && !addressed),
        ("gateway", network.gateway.is_some() && !addressed),
        ("uplink", network.uplink.is_some() && profile.wire != Wiring::Vlan),
        ("vlan", network.vlan.is_some() && profile.wire != Wiring::Vlan),
        ("host_services", !network.host_services.is_empty() && profile.wire != Wiring::OwnBridge),
        ("bridge", network.bridge.is_some() && profile.wire == Wiring::User),
        // Each VLAN that a request asks for has a bridge of its own.
        ("bridge", network.bridge.is_some() && network.uplink.is_some() && network.vlan.is_none()),
        ("mtu", network.mtu.is_some() && profile.wire == Wiring::User),
    ];
    match useless.iter().find(|(_, useless)| *useless) {
        Some((key, _)) => Err(bad_config(
            name,
            &format!("has the profile '{}', where '{key}' says nothing", network.profile),
        )),
        None => Ok(()),
    }
}

/// The operator's choice, or else the request's.
fn vlan(
    name: &str,
    network: &Network,
    profile: &Profile,
    requested: Option<u16>,
) -> Result<Option<u16>> {
    match (profile.wire == Wiring::Vlan, network.vlan.map(number), requested) {
        (false, _, None) => Ok(None),
        (false, _, Some(_)) => Err(bad_request(
            name,
            &format!("has the profile '{}', where a vlan says nothing", network.profile),
        )),
        (true, Some(configured), Some(asked)) if configured != asked => {
            Err(bad_request(name, &format!("is VLAN {configured}, the request wants {asked}")))
        }
        (true, None, None) => Err(bad_request(
            name,
            "has no VLAN of its own, and the request brings none",
        )
        .hint(format!(
            "give the subnet in the manifest the cloud property vlan, or set networks.{name}.vlan"
        ))),
        (true, configured, asked) => Ok(configured.or(asked)),
    }
}

fn number(vlan: crate::config::VlanId) -> u16 {
    u16::try_from(vlan.get()).expect("at most 4094")
}

/// The bytes of an MTU.
pub fn bytes(mtu: Mtu) -> u32 {
    u32::try_from(mtu.get()).expect("at most 65535")
}

/// The host's address in the subnet, with the subnet's prefix.
fn host_address(name: &str, network: &Network, requested: &Requested) -> Result<IpNetwork> {
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
        Some(subnet) => in_configured(name, subnet, network.gateway, gateway)?,
        None => in_requested(name, requested, gateway)?,
    };
    let widest = if host.is_ipv4() { WIDEST.0 } else { WIDEST.1 };
    if host.prefix() < widest {
        return Err(bad_request(
            name,
            &format!("can not be as wide as {host}: /{widest} is the widest"),
        ));
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

/// Without: the request's gateway and netmask.
fn in_requested(name: &str, requested: &Requested, gateway: Option<IpAddr>) -> Result<IpNetwork> {
    let missing = |what: &str| {
        bad_request(name, &format!("has no subnet of its own, and the request brings no {what}"))
            .hint(format!("give the subnet in the manifest a gateway and a range, or set networks.{name}.subnet"))
    };
    let gateway = gateway.ok_or_else(|| missing("gateway"))?;
    let netmask = requested.netmask.ok_or_else(|| missing("netmask"))?;
    let prefix = ip_mask_to_prefix(netmask).ok().filter(|_| netmask.is_ipv4() == gateway.is_ipv4());
    let prefix = prefix.ok_or_else(|| {
        bad_request(name, &format!("can not have netmask {netmask} and gateway {gateway}"))
    })?;
    Ok(with_prefix(gateway, prefix))
}

/// The guest's address and mask must lie in the subnet, or it would look for its neighbours elsewhere.
fn check_guest(name: &str, host: IpNetwork, requested: &Requested) -> Result<()> {
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
        &format!("has the subnet {subnet}, which the netmask {netmask} of ip {ip} leaves"),
    ))
}

/// Whether all of `part` is in `all`.
pub fn lies_in(part: IpNetwork, all: IpNetwork) -> bool {
    all.contains(part.network()) && all.prefix() <= part.prefix()
}

/// Whether two subnets share an address.
pub fn overlap(one: IpNetwork, other: IpNetwork) -> bool {
    one.contains(other.network()) || other.contains(one.network())
}

/// Whether a route is to the whole world, or its half: VPNs have two in place of one (OpenVPN's `redirect-gateway def1`).
/// All of IPv6's world is in 2000::/3.
pub(super) fn is_default(to: IpNetwork) -> bool {
    to.prefix() <= if to.is_ipv4() { 1 } else { 3 }
}

/// The subnet that an address with a prefix is in.
pub(super) fn subnet(address: IpNetwork) -> IpNetwork {
    with_prefix(address.network(), address.prefix())
}

fn with_prefix(ip: IpAddr, prefix: u8) -> IpNetwork {
    IpNetwork::new(ip, prefix).expect("a prefix taken from an address or mask of the same family")
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
