//! Plans what a NIC needs from the host: a function of the operator's
//! [`config::Network`](crate::config::Network), its [`Profile`] and the addresses of a request.
//! Pure: nothing here reads the host's state.

mod host_address;

use std::net::{IpAddr, Ipv4Addr};

use ipnetwork::{IpNetwork, Ipv4Network};

use self::host_address::host_address;
use super::profile::{Profile, Wiring};
use crate::config::{Mtu, Network};
use crate::error::{Error, ErrorKind, Result};
use crate::link_name::LinkName;
use crate::ranges::AddressRange;
pub use crate::store::record::{Keeper, Segment};
use crate::store::record::{UserNetwork, VlanLink};

/// Subnets whose addresses differ from site to site (RFC 1918, 6598, 4193) or serve documentation
/// and benchmarks (RFC 2544, 5737, 3849). Every other address counts as public.
const PRIVATE_SUBNETS: [&str; 10] = [
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

/// What a request says about one NIC: keys of a BOSH network and its cloud properties, under their
/// own names.
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

/// The planned connection of a NIC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NicPlan {
    /// A tap on a bridge.
    Bridge(Segment),
    /// QEMU's own network stack.
    User(UserNetwork),
}

/// Plans the NIC that a request wants on the host network `name`.
///
/// # Errors
/// [`ErrorKind::BadConfig`] if the operator's network contradicts itself, [`ErrorKind::BadRequest`]
/// if the request does not fit the network; both name what differs.
pub fn plan_nic(
    name: &str,
    network: &Network,
    profile: &Profile,
    requested: &Requested,
) -> Result<NicPlan> {
    ensure_keys_apply(name, network, profile)?;
    let vlan = vlan(name, network, profile, requested.vlan)?;
    if profile.wire == Wiring::User {
        return user_network(name, network, requested).map(NicPlan::User);
    }
    let addresses =
        if profile.gateway { vec![host_address(name, network, requested)?] } else { Vec::new() };
    if let Some(address) =
        addresses.first().filter(|address| network.subnet.is_none() && !is_private(**address))
    {
        let problem = format!(
            "cannot have {}, which the request chose: it is no private subnet",
            subnet(*address)
        );
        let hint = format!("if these addresses belong to your site, set networks.{name}.subnet");
        return Err(bad_request(name, &problem).hint(hint));
    }
    segment(name, network, profile, vlan, addresses).map(NicPlan::Bridge)
}

/// Whether all addresses of the subnet are private.
pub fn is_private(subnet: IpNetwork) -> bool {
    PRIVATE_SUBNETS.iter().any(|text| is_subnet_of(subnet, text.parse().expect("a subnet")))
}

/// Plans a NIC on QEMU's own network stack. QEMU forwards ports to IPv4 addresses only (10.0: "Bad
/// host address"). It uses three addresses of the subnet besides the guest's: its own, a name
/// server's, and the broadcast address.
fn user_network(name: &str, network: &Network, requested: &Requested) -> Result<UserNetwork> {
    let given = [
        requested.ip,
        requested.gateway,
        network.gateway,
        network.subnet.map(|subnet| subnet.ip()),
    ];
    let gateway = if given.iter().all(Option::is_none) {
        // QEMU's default (`net/slirp.c`).
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
            &format!("cannot be as narrow as {gateway}: /29 is the narrowest"),
        ));
    }
    let guest = match requested.ip {
        Some(IpAddr::V4(guest)) => guest,
        Some(IpAddr::V6(_)) => unreachable!("it lies in the gateway's subnet"),
        None => default_guest_address(name, network, gateway)?,
    };
    Ok(UserNetwork { network: name.to_owned(), gateway, guest })
}

/// Returns the guest's address if neither request nor operator chose one. Every guest is alone with
/// its router, so all may have the same: the first that QEMU would lease (`slirp_init`), or else
/// the first of the pool.
fn default_guest_address(name: &str, network: &Network, gateway: Ipv4Network) -> Result<Ipv4Addr> {
    let pool = dynamic_pool(name, network, gateway.into())?;
    let usable = |ip: &Ipv4Addr| {
        let is_reserved = [gateway.network(), gateway.ip(), gateway.broadcast()].contains(ip);
        pool.contains(IpAddr::V4(*ip)) && !is_reserved
    };
    let lease = Ipv4Addr::from(u32::from(gateway.network()).saturating_add(15));
    let v4 = |ip| if let IpAddr::V4(ip) = ip { Some(ip) } else { None };
    let found = [lease].into_iter().chain(pool.addresses().filter_map(v4)).find(usable);
    found.ok_or_else(|| bad_config(name, "has a pool without an address for a VM"))
}

/// Returns the addresses in `subnet` for networks of type `dynamic`: the configured pool, or the
/// whole subnet.
///
/// # Errors
/// [`ErrorKind::BadConfig`] if the configured pool is not inside the subnet.
pub fn dynamic_pool(name: &str, network: &Network, subnet: IpNetwork) -> Result<AddressRange> {
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

/// Returns the segment that the configuration alone gives the host network `name`. Returns `None`
/// if the network has no bridge, or if only a request determines it.
///
/// # Errors
/// [`ErrorKind::BadConfig`] as [`plan_nic`].
pub fn configured_segment(
    name: &str,
    network: &Network,
    profile: &Profile,
) -> Result<Option<Segment>> {
    ensure_keys_apply(name, network, profile)?;
    let vlan = network.vlan.map(vlan_number);
    if profile.wire == Wiring::User || profile.wire == Wiring::Vlan && vlan.is_none() {
        return Ok(None);
    }
    let addresses = match network.subnet {
        Some(_) if profile.gateway => vec![host_address(name, network, &Requested::default())?],
        _ => Vec::new(),
    };
    segment(name, network, profile, vlan, addresses).map(Some)
}

/// Adds to `one` what `other` needs of the same bridge, if both can share it. Manifests with
/// several subnets, and networks of both IP versions, share bridges.
///
/// # Errors
/// [`ErrorKind::BadConfig`] naming both networks.
pub fn merge(one: &mut Segment, other: &Segment) -> Result<()> {
    let disagree = || {
        let (a, b, bridge) = (&one.network, &other.network, &one.bridge);
        let problem =
            format!("bridge '{bridge}' cannot be what both network '{a}' and network '{b}' need");
        Error::new(ErrorKind::BadConfig, problem).hint(
            "name another bridge for one of them; a VM keeps its network until it is recreated",
        )
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
            // A record from before `services` existed adds nothing; the services of all other VMs
            // add up.
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

/// Returns the segment of a bridge that a subnet's cloud properties name: `{"bridge": "br0"}`.
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
        // One bridge for each VLAN. Two uplinks with one VLAN need two bridge names; only the
        // kernel's state shows that conflict.
        (None, Some(uplink)) => {
            LinkName::parse(&format!("bosh-vlan{}", uplink.vlan)).expect("13 characters")
        }
        (None, None) => {
            let problem = format!("has the profile '{}' and no bridge", network.profile);
            let hint = format!("set networks.{name}.bridge to a bridge of this host");
            return Err(bad_config(name, &problem).hint(hint));
        }
    };
    let made_by_cpi = profile.wire == Wiring::OwnBridge || uplink.is_some();
    Ok(Segment {
        network: name.to_owned(),
        bridge,
        mtu: network.mtu.map(mtu_bytes),
        // The VLAN sub-interface removes the tags.
        vlan: if uplink.is_some() { None } else { vlan },
        isolated: !profile.neighbours,
        keeper: if made_by_cpi {
            let closed = profile.wire == Wiring::OwnBridge && !profile.forward;
            let services = network
                .host_services
                .iter()
                .map(|port| (port.protocol.number(), port.port))
                .collect();
            // On a VLAN, the host is a machine like any other.
            let services = (profile.wire == Wiring::OwnBridge).then_some(services);
            Keeper::Cpi { addresses, masquerade: profile.masquerade, services, closed, uplink }
        } else {
            Keeper::Operator
        },
    })
}

/// Ensures that every key of the network has an effect in this profile: one without is a
/// misunderstanding.
fn ensure_keys_apply(name: &str, network: &Network, profile: &Profile) -> Result<()> {
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
            &format!("has the profile '{}', where '{key}' has no effect", network.profile),
        )),
        None => Ok(()),
    }
}

/// Returns the VLAN: the operator's choice, or else the request's.
fn vlan(
    name: &str,
    network: &Network,
    profile: &Profile,
    requested: Option<u16>,
) -> Result<Option<u16>> {
    match (profile.wire == Wiring::Vlan, network.vlan.map(vlan_number), requested) {
        (false, _, None) => Ok(None),
        (false, _, Some(_)) => Err(bad_request(
            name,
            &format!("has the profile '{}', where a vlan has no effect", network.profile),
        )),
        (true, Some(configured), Some(asked)) if configured != asked => {
            Err(bad_request(name, &format!("is VLAN {configured}, the request wants {asked}")))
        }
        (true, None, None) => Err(bad_request(
            name,
            "has no VLAN of its own, and the request has none",
        )
        .hint(format!(
            "give the subnet in the manifest the cloud property vlan, or set networks.{name}.vlan"
        ))),
        (true, configured, asked) => Ok(configured.or(asked)),
    }
}

fn vlan_number(vlan: crate::config::VlanId) -> u16 {
    u16::try_from(vlan.get()).expect("at most 4094")
}

/// An MTU in bytes.
pub fn mtu_bytes(mtu: Mtu) -> u32 {
    u32::try_from(mtu.get()).expect("at most 65535")
}

/// Whether all of `part` is in `all`.
pub fn is_subnet_of(part: IpNetwork, all: IpNetwork) -> bool {
    all.contains(part.network()) && all.prefix() <= part.prefix()
}

/// Whether two subnets share an address.
pub fn overlap(one: IpNetwork, other: IpNetwork) -> bool {
    one.contains(other.network()) || other.contains(one.network())
}

/// Whether a route leads to the whole Internet or a half of it: VPNs replace a default route by two
/// (OpenVPN's `redirect-gateway def1`). All public IPv6 addresses are in 2000::/3.
pub(super) fn is_default(to: IpNetwork) -> bool {
    to.prefix() <= if to.is_ipv4() { 1 } else { 3 }
}

/// Returns the subnet of an address with a prefix.
pub(super) fn subnet(address: IpNetwork) -> IpNetwork {
    with_prefix(address.network(), address.prefix())
}

fn with_prefix(ip: IpAddr, prefix: u8) -> IpNetwork {
    IpNetwork::new(ip, prefix).expect("a prefix of an address or mask of the same family")
}

fn bad_config(network: &str, problem: &str) -> Error {
    Error::new(ErrorKind::BadConfig, format!("host network '{network}' {problem}"))
}

fn bad_request(network: &str, problem: &str) -> Error {
    Error::new(ErrorKind::BadRequest, format!("host network '{network}' {problem}"))
}

#[cfg(test)]
mod tests;
