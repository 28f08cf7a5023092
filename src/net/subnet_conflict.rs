//! Conflicts of a requested subnet with the host's own addresses and routes. An operator may give
//! VMs a subnet that other links have, and `host_firewalls` then reports the consequences. A
//! request must not draw the host's own packets to a bridge.

use ipnetwork::IpNetwork;

use super::diff::is_cpi_bridge;
use super::link::{Links, Route};
use super::plan::{Keeper, Segment, is_default, overlap, subnet};
use crate::error::{Error, ErrorKind, Result};

/// Refuses a segment if one of its subnets is elsewhere on this host: as an address of another
/// link, or as the destination of a route. Addresses that the segment's bridge has already are no
/// conflict.
///
/// # Errors
/// [`ErrorKind::Conflict`] naming the address or route; [`ErrorKind::Host`] if the kernel does not
/// answer.
pub fn ensure_free(segment: &Segment) -> Result<()> {
    let Keeper::Cpi { addresses: wanted, .. } = &segment.keeper else { return Ok(()) };
    let links = Links::open()?;
    let find_bridge = || {
        Ok::<_, Error>(
            links.find(&segment.bridge)?.filter(|link| is_cpi_bridge(link, &segment.bridge)),
        )
    };
    loop {
        let bridge = find_bridge()?.map(|link| link.index);
        let Some((wanted, conflict)) = find_conflict(&links, wanted, bridge)? else {
            return Ok(());
        };
        let link = conflict.link().map(|index| links.find_by_index(index)).transpose()?;
        // Another call may have made or removed the bridge between the two queries: query again.
        if find_bridge()?.map(|link| link.index) == bridge && link != Some(None) {
            let name = link.flatten().map(|link| link.name);
            return Err(Error::new(
                ErrorKind::Conflict,
                format!(
                    "the request chose the subnet {wanted} for network '{}', \
                     which overlaps with {}",
                    segment.network,
                    conflict.describe(name.as_deref())
                ),
            ));
        }
    }
}

/// Returns the first subnet of `wanted` in use outside the bridge, and what uses it.
fn find_conflict(
    links: &Links,
    wanted: &[IpNetwork],
    bridge: Option<u32>,
) -> Result<Option<(IpNetwork, Conflict)>> {
    let present = links.addresses()?;
    let is_on_bridge = |wanted: &&IpNetwork| {
        present.iter().any(|(at, address)| Some(*at) == bridge && address == *wanted)
    };
    let new: Vec<_> = wanted.iter().filter(|wanted| !is_on_bridge(wanted)).collect();
    if new.is_empty() {
        return Ok(None);
    }
    let routes = links.routes()?;
    let mut new = new.into_iter().map(|wanted| subnet(*wanted));
    Ok(new.find_map(|wanted| {
        conflict_with(wanted, bridge, &present, &routes).map(|conflict| (wanted, conflict))
    }))
}

/// What uses a subnet on this host.
#[derive(Debug, PartialEq, Eq)]
enum Conflict {
    /// An address on the link with this index.
    Address(u32, IpNetwork),
    /// A route.
    Route(Route),
}

impl Conflict {
    /// The link's index, unless the route leads nowhere.
    fn link(&self) -> Option<u32> {
        match self {
            Self::Address(link, _) => Some(*link),
            Self::Route(route) => route.link,
        }
    }

    /// Describes the conflict; `name` is the link's name.
    fn describe(&self, name: Option<&str>) -> String {
        let name = name.unwrap_or("unknown");
        match self {
            Self::Address(_, address) => format!("this host's address {address} on '{name}'"),
            Self::Route(Route { link: Some(_), to }) => format!("the route of {to} to '{name}'"),
            Self::Route(Route { link: None, to }) => format!("the route of {to} to no link"),
        }
    }
}

fn conflict_with(
    wanted: IpNetwork,
    bridge: Option<u32>,
    addresses: &[(u32, IpNetwork)],
    routes: &[Route],
) -> Option<Conflict> {
    let address =
        addresses.iter().find(|(link, address)| Some(*link) != bridge && overlap(wanted, *address));
    let route = || {
        let others = routes.iter().filter(|route| route.link.is_none() || route.link != bridge);
        others.filter(|route| !is_default(route.to)).find(|route| overlap(wanted, route.to))
    };
    let address = address.map(|(link, address)| Conflict::Address(*link, *address));
    address.or_else(|| route().cloned().map(Conflict::Route))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subnet_of_the_hosts_addresses_or_routes_is_a_conflict() {
        let net = |text: &str| text.parse::<IpNetwork>().unwrap();
        let route = |link, to| Route { link, to: net(to) };
        let addresses =
            [(1, net("127.0.0.1/8")), (2, net("192.0.2.1/24")), (3, net("10.0.0.1/24"))];
        let routes = [
            route(Some(2), "0.0.0.0/0"),
            route(Some(4), "128.0.0.0/1"),
            route(Some(2), "192.0.2.0/24"),
            route(Some(3), "10.0.0.0/24"),
            route(Some(4), "172.16.0.0/16"),
            route(None, "198.18.0.0/15"),
            route(Some(2), "2000::/3"),
        ];
        let conflict =
            |wanted: &str, bridge| conflict_with(net(wanted), bridge, &addresses, &routes);
        assert_eq!(
            conflict("192.0.2.128/25", None),
            Some(Conflict::Address(2, net("192.0.2.1/24")))
        );
        assert_eq!(conflict("10.0.0.0/8", None), Some(Conflict::Address(3, net("10.0.0.1/24"))));
        assert_eq!(conflict("10.0.0.0/8", Some(3)), None, "the bridge's own");
        assert_eq!(
            conflict("172.16.9.0/24", Some(3)),
            Some(Conflict::Route(route(Some(4), "172.16.0.0/16")))
        );
        assert_eq!(
            conflict("198.18.5.0/24", None),
            Some(Conflict::Route(route(None, "198.18.0.0/15")))
        );
        assert_eq!(conflict("192.168.0.0/16", None), None, "the default route, and half of one");
        assert_eq!(conflict("2001:db8::/64", None), None, "the whole of IPv6");
    }
}
