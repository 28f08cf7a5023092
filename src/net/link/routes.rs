//! Routes of the host, and queries of the route to an address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use ipnetwork::IpNetwork;
use nix::errno::Errno;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};

use super::{Link, Links, failed, unless};
use crate::error::Result;

/// A route as the kernel reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::net) struct Route {
    /// Index of its link, or of its first; `None` if it leads nowhere (`blackhole`, `unreachable`).
    pub link: Option<u32>,
    /// Its destination.
    pub to: IpNetwork,
}

impl Links {
    /// Returns the subnets that the main table routes to the link `index`, of the same family as
    /// `family_of`.
    pub fn routes_to(&self, index: u32, family_of: IpAddr) -> Result<Vec<IpNetwork>> {
        let mut message = table_request(RouteHeader::RT_TABLE_MAIN, family_of);
        message.attributes.push(RouteAttribute::Oif(index));
        Ok(self.dump_routes(message)?.iter().filter_map(route_from).map(|route| route.to).collect())
    }

    /// Returns every route of every table but that of the host's own addresses: VPNs have tables of
    /// their own.
    pub fn routes(&self) -> Result<Vec<Route>> {
        let mut all = Vec::new();
        for family_of in INTERNET_ADDRESSES {
            let routes =
                self.dump_routes(table_request(RouteHeader::RT_TABLE_UNSPEC, family_of))?;
            let others = routes.iter().filter(|route| route.header.table != RT_TABLE_LOCAL);
            all.extend(others.filter_map(route_from));
        }
        Ok(all)
    }

    fn dump_routes(&self, message: RouteMessage) -> Result<Vec<RouteMessage>> {
        let routes =
            self.runtime.block_on(self.handle.route().get(message).execute().try_collect());
        // A kernel without IPv6 lacks the family.
        let routes = unless(routes, Errno::EOPNOTSUPP, Vec::new());
        routes.map_err(|error| failed("list the host's routes".to_owned(), error))
    }

    /// Returns the link of the default route. Asks the kernel, and sends no packet.
    pub fn default_route_link(&self) -> Result<Option<Link>> {
        for address in INTERNET_ADDRESSES {
            let route = self.route_for(address);
            if let Some(index) = route.as_ref().and_then(route_from).and_then(|route| route.link) {
                return self.find_by_index(index);
            }
        }
        Ok(None)
    }

    /// Whether `ip` is one of the host's own addresses.
    pub fn is_local(&self, ip: IpAddr) -> bool {
        self.route_for(ip).is_some_and(|route| route.header.kind == RouteType::Local)
    }

    /// Returns the route that packets to `ip` take. An error of the kernel means that there is
    /// none.
    fn route_for(&self, ip: IpAddr) -> Option<RouteMessage> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(ip);
        message.header.destination_prefix_length = if ip.is_ipv4() { 32 } else { 128 };
        message.attributes.push(RouteAttribute::Destination(ip.into()));
        let routes = self
            .runtime
            .block_on(self.handle.route().get(message).execute().try_collect::<Vec<_>>());
        routes.unwrap_or_default().into_iter().next()
    }
}

/// The routing table of the host's own addresses (`linux/rtnetlink.h`).
const RT_TABLE_LOCAL: u8 = 255;

/// Addresses of public name servers, which every default route leads to.
const INTERNET_ADDRESSES: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(8, 8, 8, 8)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0x4860, 0x4860, 0, 0, 0, 0, 0x8888)),
];

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

/// Builds the request for all routes of a table, of the same family as `family_of`.
fn table_request(table: u8, family_of: IpAddr) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(family_of);
    message.header.table = table;
    message
}

/// Builds the route that the kernel makes with an address.
pub(super) fn connected_route(index: u32, address: IpNetwork) -> RouteMessage {
    let route = RouteMessageBuilder::<IpAddr>::new()
        .output_interface(index)
        .protocol(RouteProtocol::Kernel);
    let route = route
        .destination_prefix(address.network(), address.prefix())
        .expect("a prefix of its family");
    match address.ip() {
        IpAddr::V4(ip) => {
            route.pref_source(ip.into()).expect("of one family").scope(RouteScope::Link).build()
        }
        IpAddr::V6(_) => route.build(),
    }
}

/// Reads a route. A default route's message has no destination.
fn route_from(message: &RouteMessage) -> Option<Route> {
    let mut link = None;
    let mut to: IpAddr = if message.header.address_family == AddressFamily::Inet {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::MultiPath(hops) => {
                link = link.or(hops.first().map(|hop| hop.interface_index));
            }
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => to = (*ip).into(),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => to = (*ip).into(),
            _ => {}
        }
    }
    Some(Route { link, to: IpNetwork::new(to, message.header.destination_prefix_length).ok()? })
}
