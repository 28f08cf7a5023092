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
    let Keeper::Cpi { addresses: wanted, .. } = &segment.keeper else { return Ok(()) };
    let links = Links::open()?;
    let own = || {
        Ok::<_, Error>(links.find(&segment.bridge)?.filter(|link| is_ours(link, &segment.bridge)))
    };
    loop {
        let bridge = own()?.map(|link| link.index);
        let Some((wanted, holder)) = taken(&links, wanted, bridge)? else { return Ok(()) };
        let link = holder.link().map(|index| links.numbered(index)).transpose()?;
        // What another call does with the bridge between two looks is not to be taken for somebody else's.
        if own()?.map(|link| link.index) == bridge && link != Some(None) {
            let problem =
                format!("the request chose the subnet {wanted} for network '{}'", segment.network);
            let name = link.flatten().map(|link| link.name);
            return Err(Error::new(
                ErrorKind::Conflict,
                format!("{problem}, {}", holder.words(name.as_deref())),
            ));
        }
    }
}

/// The first subnet of `wanted` that something else than the bridge has, and what that is.
fn taken(
    links: &Links,
    wanted: &[IpNetwork],
    bridge: Option<u32>,
) -> Result<Option<(IpNetwork, Holder)>> {
    let present = links.addresses()?;
    let is_there = |wanted: &&IpNetwork| {
        present.iter().any(|(at, address)| Some(*at) == bridge && address == *wanted)
    };
    let new: Vec<_> = wanted.iter().filter(|wanted| !is_there(wanted)).collect();
    if new.is_empty() {
        return Ok(None);
    }
    let routes = links.routes()?;
    let mut new = new.into_iter().map(|wanted| subnet(*wanted));
    Ok(new.find_map(|wanted| {
        holder(wanted, bridge, &present, &routes).map(|holder| (wanted, holder))
    }))
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
    /// The link's number, if it is on one.
    fn link(&self) -> Option<u32> {
        match self {
            Self::Address(link, _) => Some(*link),
            Self::Route(route) => route.link,
        }
    }

    /// `name` is that of the link.
    fn words(&self, name: Option<&str>) -> String {
        let name = name.unwrap_or("nobody");
        match self {
            Self::Address(_, address) => format!("where '{name}' has this host's own {address}"),
            Self::Route(Route { link: Some(_), to }) => format!("where {to} is routed to '{name}'"),
            Self::Route(Route { link: None, to }) => format!("where {to} is routed to nobody"),
        }
    }
}

fn holder(
    wanted: IpNetwork,
    bridge: Option<u32>,
    addresses: &[(u32, IpNetwork)],
    routes: &[Route],
) -> Option<Holder> {
    let address =
        addresses.iter().find(|(link, address)| Some(*link) != bridge && overlap(wanted, *address));
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
        let holder = |wanted: &str, bridge| holder(net(wanted), bridge, &addresses, &routes);
        assert_eq!(holder("192.0.2.128/25", None), Some(Holder::Address(2, net("192.0.2.1/24"))));
        assert_eq!(holder("10.0.0.0/8", None), Some(Holder::Address(3, net("10.0.0.1/24"))));
        assert_eq!(holder("10.0.0.0/8", Some(3)), None, "the bridge's own");
        assert_eq!(
            holder("172.16.9.0/24", Some(3)),
            Some(Holder::Route(route(Some(4), "172.16.0.0/16")))
        );
        assert_eq!(
            holder("198.18.5.0/24", None),
            Some(Holder::Route(route(None, "198.18.0.0/15")))
        );
        assert_eq!(holder("192.168.0.0/16", None), None, "the default route, and half of one");
        assert_eq!(holder("2001:db8::/64", None), None, "the whole of IPv6");
    }
}
