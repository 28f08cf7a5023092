//! Links and addresses over rtnetlink: the only file that knows the `rtnetlink` crate, whose API changes often.
//!
//! A race is an answer here, not an error: to make what exists or to change what has gone returns `false`.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use ipnetwork::IpNetwork;
use nix::errno::Errno;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{
    BridgeStpState, BridgeVlanInfoFlags, InfoBridge, InfoBridgePort, InfoData, InfoPortData, LinkAttribute, LinkFlags,
    LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{NeighbourFlags, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
};
use rtnetlink::{
    Handle, LinkBridge, LinkBridgePort, LinkBridgeVlan, LinkMessageBuilder, LinkUnspec, LinkVlan, RouteMessageBuilder,
};
use tokio::runtime::Runtime;

use super::change::{Change, Settings};
use crate::error::{Error, Result};
use crate::link_name::LinkName;
use crate::mac::MacAddress;

/// A netlink socket in the network namespace of the thread that opened it.
pub(super) struct Links {
    runtime: Runtime,
    handle: Handle,
    /// Numbers of links that were looked up: each look waits for the kernel's one lock of all links.
    known: RefCell<BTreeMap<LinkName, u32>>,
}

/// A link as the kernel has it.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Link {
    /// Its name; not every name is one we would give.
    pub name: String,
    /// Its number, never used again for another link of this boot.
    pub index: u32,
    /// Its driver: `bridge`, `tun`, `veth`; none for hardware.
    pub kind: Option<String>,
    /// Text for people, `ip link set … alias`.
    pub alias: Option<String>,
    /// Its Ethernet address.
    pub mac: Option<MacAddress>,
    /// Largest packet, bytes.
    pub mtu: u32,
    /// Whether it is switched on.
    pub up: bool,
    /// The bridge it is a port of.
    pub controller: Option<u32>,
    /// For ports: whether the bridge learns from what comes out of it who is behind it.
    pub learns: bool,
    /// For bridges: whether ports are on VLANs (`vlan_filtering`).
    pub tells_vlans_apart: bool,
    /// For bridges: the VLAN that a new port is on.
    pub default_vlan: Option<u16>,
}

impl Links {
    pub fn open() -> Result<Self> {
        let fail = |error| Error::os("open a netlink socket", error);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(fail)?;
        let inside = runtime.enter();
        let (connection, handle, _messages) = rtnetlink::new_connection_with_strict_check().map_err(fail)?;
        runtime.spawn(connection);
        drop(inside);
        Ok(Self { runtime, handle, known: RefCell::default() })
    }

    /// The link called `name`.
    pub fn find(&self, name: &LinkName) -> Result<Option<Link>> {
        let found = self.runtime.block_on(self.handle.link().get().match_name(name.as_str()).execute().try_next());
        let message =
            unless(found.map(Some), Errno::ENODEV, None).map_err(|e| failed(format!("look up link '{name}'"), e))?;
        let link = message.flatten().as_ref().map(link_from);
        if let Some(link) = &link {
            self.known.borrow_mut().insert(name.clone(), link.index);
        }
        Ok(link)
    }

    /// Every link there is.
    pub fn all(&self) -> Result<Vec<Link>> {
        let links: Vec<_> = self
            .runtime
            .block_on(self.handle.link().get().execute().try_collect())
            .map_err(|e| failed("list the host's links".to_owned(), e))?;
        Ok(links.iter().map(link_from).collect())
    }

    /// Forgets what was looked up, because somebody else is at work.
    pub fn forget(&self) {
        self.known.borrow_mut().clear();
    }

    /// The number that a link had at the last look. A link that has gone meanwhile is none of the kernel's.
    fn index(&self, name: &LinkName) -> Result<Option<u32>> {
        let known = self.known.borrow().get(name).copied();
        known.map_or_else(|| Ok(self.find(name)?.map(|link| link.index)), |index| Ok(Some(index)))
    }

    /// The ports of the bridge `index`.
    pub fn ports(&self, index: u32) -> Result<Vec<Link>> {
        let mut request = self.handle.link().get();
        // Asks the kernel for these only; old ones send all.
        request.message_mut().attributes.push(LinkAttribute::Controller(index));
        let links: Vec<_> = self
            .runtime
            .block_on(request.execute().try_collect())
            .map_err(|e| failed("list the ports of a bridge".to_owned(), e))?;
        Ok(links.iter().map(link_from).filter(|link| link.controller == Some(index)).collect())
    }

    /// Does one change of a link, address or route; `false` if what it is about has come or gone meanwhile.
    pub fn make(&self, change: &Change) -> Result<bool> {
        let failed = |error| {
            let errno = errno(&error);
            let error = failed(format!("'{change}'"), error);
            match (errno, change) {
                (Some(Errno::EOPNOTSUPP), Change::AddBridge { .. }) => error.hint("modprobe bridge"),
                (Some(Errno::EOPNOTSUPP), Change::AddVlan { .. }) => {
                    error.hint("VLAN sub-interfaces need the kernel module: modprobe 8021q")
                }
                _ => error,
            }
        };
        let found = |name: &LinkName| self.index(name);
        match change {
            Change::AddBridge { name, mac, mtu } => {
                let bridge = LinkMessageBuilder::<LinkBridge>::new(name.as_str()).address(mac.octets().to_vec());
                let bridge = bridge.stp_state(BridgeStpState::Disabled).forward_delay(0).mtu(*mtu);
                let added = self.runtime.block_on(self.handle.link().add(bridge.build()).execute());
                settled(added, Errno::EEXIST).map_err(failed)
            }
            Change::AddVlan { name, carrier, vlan } => {
                let Some(carrier) = found(carrier)? else { return Ok(false) };
                let link = LinkVlan::new(name.as_str(), carrier, *vlan).build();
                let added = self.runtime.block_on(self.handle.link().add(link).execute());
                settled(added, Errno::EEXIST).map_err(failed)
            }
            Change::Set { link, to } => {
                let Some(index) = found(link)? else { return Ok(false) };
                let controller = match &to.controller {
                    Some(bridge) => match found(bridge)? {
                        Some(index) => Some(index),
                        None => return Ok(false),
                    },
                    None => None,
                };
                let changed = self.runtime.block_on(self.handle.link().set(settings(index, to, controller)).execute());
                match changed {
                    // So the kernel says of a bridge that has gone.
                    Err(error) if controller.is_some() && errno(&error) == Some(Errno::EINVAL) => {
                        let bridge = to.controller.as_ref().expect("as was just seen");
                        if self.find(bridge)?.map(|link| link.index) == controller {
                            Err(failed(error))
                        } else {
                            Ok(false)
                        }
                    }
                    changed => settled(changed, Errno::ENODEV).map_err(failed),
                }
            }
            Change::Isolate(port) => {
                let Some(index) = found(port)? else { return Ok(false) };
                let port = LinkBridgePort::new(index).isolated(true).build();
                let changed = self.runtime.block_on(self.handle.link().change(port).execute());
                settled(changed, Errno::ENODEV).map_err(failed)
            }
            Change::Bind { port, mac } => {
                let Some(index) = found(port)? else { return Ok(false) };
                settled(self.bind(index, *mac), Errno::ENODEV).map_err(failed)
            }
            Change::Tag { port, vlan, instead_of } => {
                let Some(index) = found(port)? else { return Ok(false) };
                self.tag(index, *vlan, *instead_of).map_err(failed)
            }
            Change::AddAddress { link, address } => {
                let Some(index) = found(link)? else { return Ok(false) };
                let request = self.handle.address().add(index, address.ip(), address.prefix());
                let added = unless(self.runtime.block_on(request.execute()), Errno::EEXIST, ());
                settled(added, Errno::ENODEV).map_err(failed)
            }
            Change::AddRoute { link, address } => {
                let Some(index) = found(link)? else { return Ok(false) };
                let added = self.runtime.block_on(self.handle.route().add(own_route(index, *address)).execute());
                let added = unless(added, Errno::EEXIST, ());
                settled(added, Errno::ENODEV).map_err(failed)
            }
            Change::Write { .. } | Change::Rules(_) => unreachable!("neither is about links"),
        }
    }

    fn bind(&self, port: u32, mac: MacAddress) -> Result<(), rtnetlink::Error> {
        let silent = LinkBridgePort::new(port).learning(false).build();
        self.runtime.block_on(self.handle.link().change(silent).execute())?;
        let known = self.handle.neighbours().add_bridge(port, &mac.octets()).state(NeighbourState::Noarp);
        let known = known.flags(NeighbourFlags::Controller | NeighbourFlags::Sticky).replace();
        self.runtime.block_on(known.execute())
    }

    /// Puts a port on one VLAN, untagged, and on no other.
    fn tag(&self, port: u32, vlan: u16, instead_of: Option<u16>) -> Result<bool, rtnetlink::Error> {
        let untagged = BridgeVlanInfoFlags::Pvid | BridgeVlanInfoFlags::Untagged;
        let message = LinkBridgeVlan::new(port).vlan(vlan, untagged).build();
        self.runtime.block_on(self.handle.link().set(message).execute())?;
        if let Some(other) = instead_of {
            let message = LinkBridgeVlan::new(port).vlan(other, BridgeVlanInfoFlags::empty()).build();
            self.runtime.block_on(self.handle.link().del_with_message(message).execute())?;
        }
        Ok(true)
    }

    /// Subnets that the main table routes to the link `index`, of the family of `like`.
    pub fn routes_to(&self, index: u32, like: IpAddr) -> Result<Vec<IpNetwork>> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(like);
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.attributes.push(RouteAttribute::Oif(index));
        Ok(self.dump_routes(message)?.iter().filter_map(route_from).map(|(_, subnet)| subnet).collect())
    }

    /// Every route of the main table, with the number of its link.
    pub fn routes(&self) -> Result<Vec<(u32, IpNetwork)>> {
        let mut all = Vec::new();
        for like in FAR_AWAY {
            let mut message = RouteMessage::default();
            message.header.address_family = family(like);
            message.header.table = RouteHeader::RT_TABLE_MAIN;
            all.extend(self.dump_routes(message)?.iter().filter_map(route_from));
        }
        Ok(all)
    }

    fn dump_routes(&self, message: RouteMessage) -> Result<Vec<RouteMessage>> {
        let routes = self.runtime.block_on(self.handle.route().get(message).execute().try_collect());
        // A kernel without IPv6 has no such family.
        let routes = unless(routes, Errno::EOPNOTSUPP, Vec::new());
        routes.map_err(|error| failed("list the host's routes".to_owned(), error))
    }

    /// The link by which packets to the world leave. The kernel is asked; nothing is sent.
    pub fn to_the_world(&self) -> Result<Option<Link>> {
        for far_away in FAR_AWAY {
            let mut message = RouteMessage::default();
            message.header.address_family = family(far_away);
            message.header.destination_prefix_length = if far_away.is_ipv4() { 32 } else { 128 };
            message.attributes.push(RouteAttribute::Destination(far_away.into()));
            let routes: Result<Vec<_>, _> =
                self.runtime.block_on(self.handle.route().get(message).execute().try_collect());
            // A refusal says that there is no way.
            let links = routes.unwrap_or_default().into_iter().flat_map(|route| route.attributes);
            let index =
                links.into_iter().find_map(|a| if let RouteAttribute::Oif(index) = a { Some(index) } else { None });
            if let Some(index) = index {
                return self.numbered(index);
            }
        }
        Ok(None)
    }

    /// The link number `index`.
    pub fn numbered(&self, index: u32) -> Result<Option<Link>> {
        let found = self.runtime.block_on(self.handle.link().get().match_index(index).execute().try_next());
        let found = unless(found, Errno::ENODEV, None);
        Ok(found.map_err(|e| failed(format!("look up link {index}"), e))?.as_ref().map(link_from))
    }

    /// Removes a link; `false` if it has gone already.
    pub fn delete(&self, name: &LinkName, index: u32) -> Result<bool> {
        let deleted = self.runtime.block_on(self.handle.link().del(index).execute());
        settled(deleted, Errno::ENODEV).map_err(|e| failed(format!("remove link '{name}'"), e))
    }

    /// Every address of the host, with the number of its link.
    pub fn addresses(&self) -> Result<Vec<(u32, IpNetwork)>> {
        let addresses: Vec<_> = self
            .runtime
            .block_on(self.handle.address().get().execute().try_collect())
            .map_err(|e| failed("list the host's addresses".to_owned(), e))?;
        Ok(addresses.iter().filter_map(address_from).collect())
    }
}

/// Addresses of the world's name servers, which every default route leads to.
const FAR_AWAY: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(8, 8, 8, 8)), IpAddr::V6(Ipv6Addr::new(0x2001, 0x4860, 0x4860, 0, 0, 0, 0, 0x8888))];

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn settings(index: u32, to: &Settings, controller: Option<u32>) -> LinkMessage {
    let mut link = LinkUnspec::new_with_index(index);
    if let Some(alias) = &to.alias {
        link = link.alias(alias.clone());
    }
    if let Some(mac) = to.mac {
        link = link.address(mac.octets().to_vec());
    }
    if let Some(mtu) = to.mtu {
        link = link.mtu(mtu);
    }
    if let Some(controller) = controller {
        link = link.controller(controller);
    }
    if to.up {
        link = link.up();
    }
    link.build()
}

/// The route that the kernel makes with an address.
fn own_route(index: u32, address: IpNetwork) -> RouteMessage {
    let route = RouteMessageBuilder::<IpAddr>::new().output_interface(index).protocol(RouteProtocol::Kernel);
    let route = route.destination_prefix(address.network(), address.prefix()).expect("a prefix of its family");
    match address.ip() {
        IpAddr::V4(ip) => route.pref_source(ip.into()).expect("of one family").scope(RouteScope::Link).build(),
        IpAddr::V6(_) => route.build(),
    }
}

/// A default route's destination is not said.
fn route_from(message: &RouteMessage) -> Option<(u32, IpNetwork)> {
    let mut index = None;
    let mut to: IpAddr = if message.header.address_family == AddressFamily::Inet {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(oif) => index = Some(*oif),
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => to = (*ip).into(),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => to = (*ip).into(),
            _ => {}
        }
    }
    Some((index?, IpNetwork::new(to, message.header.destination_prefix_length).ok()?))
}

fn link_from(message: &LinkMessage) -> Link {
    let up = message.header.flags.contains(LinkFlags::Up);
    let mut link = Link { index: message.header.index, up, ..Link::default() };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            LinkAttribute::Address(bytes) => {
                link.mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(MacAddress::from);
            }
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Controller(index) => link.controller = Some(*index),
            LinkAttribute::LinkInfo(infos) => infos.iter().for_each(|info| match info {
                LinkInfo::PortData(InfoPortData::BridgePort(settings)) => {
                    link.learns = settings.contains(&InfoBridgePort::Learning(true));
                }
                LinkInfo::Kind(kind) => link.kind = Some(kind.to_string()),
                LinkInfo::Data(InfoData::Bridge(settings)) => settings.iter().for_each(|setting| match setting {
                    InfoBridge::VlanFiltering(on) => link.tells_vlans_apart = *on,
                    InfoBridge::VlanDefaultPvid(vlan) => link.default_vlan = Some(*vlan).filter(|vlan| *vlan > 0),
                    _ => {}
                }),
                _ => {}
            }),
            _ => {}
        }
    }
    link
}

/// IPv4 has its own address in `Local` (`Address` is the peer's on point-to-point links), IPv6 in `Address`.
fn address_from(message: &AddressMessage) -> Option<(u32, IpNetwork)> {
    let local = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    let other = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Address(ip) => Some(*ip),
        _ => None,
    });
    let network = IpNetwork::new(local.or(other)?, message.header.prefix_len).ok()?;
    Some((message.header.index, network))
}

fn errno(error: &rtnetlink::Error) -> Option<Errno> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(Errno::from_raw(message.raw_code().abs())),
        _ => None,
    }
}

/// `Ok(otherwise)` in place of the failure `expected`.
fn unless<T>(result: Result<T, rtnetlink::Error>, expected: Errno, otherwise: T) -> Result<T, rtnetlink::Error> {
    result.or_else(|error| if errno(&error) == Some(expected) { Ok(otherwise) } else { Err(error) })
}

/// Whether it was done; `false` for the failure `expected`.
fn settled(result: Result<(), rtnetlink::Error>, expected: Errno) -> Result<bool, rtnetlink::Error> {
    unless(result.map(|()| true), expected, false)
}

/// The crate's own text of a kernel's refusal repeats the message's bytes; only the errno is told.
fn failed(doing: String, error: rtnetlink::Error) -> Error {
    match errno(&error) {
        Some(Errno::EPERM) => Error::os(doing, Errno::EPERM).hint(super::NEEDS_ROOT),
        Some(errno) => Error::os(doing, errno),
        None => Error::os(doing, io::Error::other(error)),
    }
}
