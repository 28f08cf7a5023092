//! Links and addresses over rtnetlink: the only file that knows the `rtnetlink` crate, whose API changes often.
//!
//! A race is an answer here, not an error: to make what exists or to change what has gone returns `false`.

use std::io;

use futures_util::TryStreamExt;
use ipnetwork::IpNetwork;
use nix::errno::Errno;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{BridgeStpState, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::{Handle, LinkBridge, LinkUnspec};
use tokio::runtime::Runtime;

use crate::error::{Error, Result};
use crate::link_name::LinkName;
use crate::mac::MacAddress;

/// A netlink socket in the network namespace of the thread that opened it.
pub(super) struct Links {
    runtime: Runtime,
    handle: Handle,
}

/// A link as the kernel has it.
#[derive(Debug, PartialEq)]
pub(super) struct Link {
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
}

/// What to change of a link. The kernel takes all of it in one message.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Changes {
    pub alias: Option<String>,
    pub mac: Option<MacAddress>,
    pub mtu: Option<u32>,
    pub controller: Option<u32>,
    /// Switches it on; `false` leaves it.
    pub up: bool,
}

impl Links {
    pub fn open() -> Result<Self> {
        let fail = |error| Error::os("open a netlink socket", error);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(fail)?;
        let inside = runtime.enter();
        let (connection, handle, _messages) = rtnetlink::new_connection().map_err(fail)?;
        runtime.spawn(connection);
        drop(inside);
        Ok(Self { runtime, handle })
    }

    /// The link called `name`.
    pub fn find(&self, name: &LinkName) -> Result<Option<Link>> {
        let found = self.runtime.block_on(self.handle.link().get().match_name(name.as_str()).execute().try_next());
        let message =
            unless(found.map(Some), Errno::ENODEV, None).map_err(|e| failed(format!("look up link '{name}'"), e))?;
        Ok(message.flatten().as_ref().map(link_from))
    }

    /// Whether any link is a port of the bridge `index`.
    pub fn has_ports(&self, index: u32) -> Result<bool> {
        let mut request = self.handle.link().get();
        // Asks the kernel for these only; old ones send all.
        request.message_mut().attributes.push(LinkAttribute::Controller(index));
        let links: Vec<_> = self
            .runtime
            .block_on(request.execute().try_collect())
            .map_err(|e| failed("list the ports of a bridge".to_owned(), e))?;
        Ok(links.iter().any(|link| link_from(link).controller == Some(index)))
    }

    /// Makes a bridge, down, that neither delays nor filters and keeps its address whatever joins it.
    pub fn add_bridge(&self, name: &LinkName, mac: MacAddress, mtu: Option<u32>) -> Result<bool> {
        let bridge = rtnetlink::LinkMessageBuilder::<LinkBridge>::new(name.as_str())
            .address(mac.octets().to_vec())
            .stp_state(BridgeStpState::Disabled)
            .forward_delay(0);
        let bridge = if let Some(mtu) = mtu { bridge.mtu(mtu) } else { bridge };
        let added = self.runtime.block_on(self.handle.link().add(bridge.build()).execute());
        settled(added, Errno::EEXIST).map_err(|e| {
            let unknown = errno(&e) == Some(Errno::EOPNOTSUPP);
            let error = failed(format!("make bridge '{name}'"), e);
            if unknown { error.hint("bridges need the kernel module: modprobe bridge") } else { error }
        })
    }

    /// Changes a link; `false` if it has gone.
    pub fn change(&self, name: &LinkName, index: u32, changes: Changes) -> Result<bool> {
        let mut link = LinkUnspec::new_with_index(index);
        if let Some(alias) = changes.alias {
            link = link.alias(alias);
        }
        if let Some(mac) = changes.mac {
            link = link.address(mac.octets().to_vec());
        }
        if let Some(mtu) = changes.mtu {
            link = link.mtu(mtu);
        }
        if let Some(controller) = changes.controller {
            link = link.controller(controller);
        }
        if changes.up {
            link = link.up();
        }
        let changed = self.runtime.block_on(self.handle.link().set(link.build()).execute());
        settled(changed, Errno::ENODEV).map_err(|e| failed(format!("change link '{name}'"), e))
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

    /// Gives a link an address it may have already; `false` if the link has gone.
    pub fn add_address(&self, name: &LinkName, index: u32, address: IpNetwork) -> Result<bool> {
        let request = self.handle.address().add(index, address.ip(), address.prefix());
        let added = unless(self.runtime.block_on(request.execute()), Errno::EEXIST, ());
        settled(added, Errno::ENODEV).map_err(|e| failed(format!("add address {address} to '{name}'"), e))
    }
}

fn link_from(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        kind: None,
        alias: None,
        mac: None,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        controller: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            LinkAttribute::Address(bytes) => {
                link.mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(MacAddress::from);
            }
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Controller(index) => link.controller = Some(*index),
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
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
