//! Whether a subnet that a request chose is free on this host. An operator may give VMs what other links have, and is told
//! what comes of it; a request must not draw the host's own packets to a bridge.

use ipnetwork::IpNetwork;

use super::diff::is_ours;
use super::link::{Links, Route};
use super::plan::{Keeper, Segment, is_default, overlap, subnet};
use crate::error::{Error, ErrorKind, Result};

/// Refuses a segment of which a subnet is elsewhere on this host: as an address of another link, or at the end of a route.
/// What its bridge has already is its own.
///
/// # Errors
/// [`ErrorKind::Conflict`] naming what has it; [`ErrorKind::Host`] if the kernel does not tell.
pub fn refuse(segment: &Segment) -> Result<()> {
    let Keeper::Us { addresses: wanted, .. } = &segment.keeper else { return Ok(()) };
    let links = Links::open()?;
    let bridge = links.find(&segment.bridge)?.filter(|link| is_ours(link, &segment.bridge)).map(|link| link.index);
    let present = links.addresses()?;
    let is_there = |wanted: &&IpNetwork| present.iter().any(|(at, address)| Some(*at) == bridge && address == *wanted);
    let new: Vec<_> = wanted.iter().filter(|wanted| !is_there(wanted)).collect();
    if new.is_empty() {
        return Ok(());
    }
    let routes = links.routes()?;
    let Some((wanted, holder)) = new.into_iter().find_map(|wanted| {
        let wanted = subnet(*wanted);
        holder(wanted, bridge, &present, &routes).map(|holder| (wanted, holder))
    }) else {
        return Ok(());
    };
    let network = &segment.network;
    let problem = format!("the request chose the subnet {wanted} for network '{network}'");
    Err(Error::new(ErrorKind::Conflict, format!("{problem}, {}", holder.words(&links)?)))
}

/// What has a subnet on this host.
#[derive(Debug, PartialEq, Eq)]
enum Holder {
    /// The link with this address.
    Address(u32, IpNetwork),
    /// This route.
    Route(Route),
}

impl Holder {
    fn words(&self, links: &Links) -> Result<String> {
        let name =
            |index: u32| Ok::<_, Error>(links.numbered(index)?.map_or_else(|| "a link".to_owned(), |link| link.name));
        Ok(match self {
            Self::Address(link, address) => format!("where '{}' has this host's own {address}", name(*link)?),
            Self::Route(Route { link: Some(link), to }) => format!("where {to} is routed to '{}'", name(*link)?),
            Self::Route(Route { link: None, to }) => format!("where {to} is routed to nobody"),
        })
    }
}

fn holder(wanted: IpNetwork, bridge: Option<u32>, addresses: &[(u32, IpNetwork)], routes: &[Route]) -> Option<Holder> {
    let address = addresses.iter().find(|(link, address)| Some(*link) != bridge && overlap(wanted, *address));
    let route = || {
        let others = routes.iter().filter(|route| route.link.is_none() || route.link != bridge);
        others.filter(|route| !is_default(route.to)).find(|route| overlap(wanted, route.to))
    };
    let address = address.map(|(link, address)| Holder::Address(*link, *address));
    address.or_else(|| route().cloned().map(Holder::Route))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_has_or_reaches_elsewhere_is_taken() {
        let net = |text: &str| text.parse::<IpNetwork>().unwrap();
        let route = |link, to| Route { link, to: net(to) };
        let addresses = [(1, net("127.0.0.1/8")), (2, net("192.0.2.1/24")), (3, net("10.0.0.1/24"))];
        let routes = [
            route(Some(2), "0.0.0.0/0"),
            route(Some(4), "128.0.0.0/1"),
            route(Some(2), "192.0.2.0/24"),
            route(Some(3), "10.0.0.0/24"),
            route(Some(4), "172.16.0.0/16"),
            route(None, "198.18.0.0/15"),
            route(Some(2), "2000::/3"),
        ];
        let holder = |wanted: &str, bridge| holder(net(wanted), bridge, &addresses, &routes);
        assert_eq!(holder("192.0.2.128/25", None), Some(Holder::Address(2, net("192.0.2.1/24"))));
        assert_eq!(holder("10.0.0.0/8", None), Some(Holder::Address(3, net("10.0.0.1/24"))));
        assert_eq!(holder("10.0.0.0/8", Some(3)), None, "the bridge's own");
        assert_eq!(holder("172.16.9.0/24", Some(3)), Some(Holder::Route(route(Some(4), "172.16.0.0/16"))));
        assert_eq!(holder("198.18.5.0/24", None), Some(Holder::Route(route(None, "198.18.0.0/15"))));
        assert_eq!(holder("192.168.0.0/16", None), None, "the default route, and half of one");
        assert_eq!(holder("2001:db8::/64", None), None, "the whole of IPv6");
    }
}
