//! Links and addresses over rtnetlink: the only room that knows the `rtnetlink` crate, whose API changes often.
//!
//! A race is an answer here, not an error: to make what exists or to change what has gone returns `false`.

mod apply;
mod messages;
mod routes;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;

use futures_util::TryStreamExt;
use ipnetwork::IpNetwork;
use nix::errno::Errno;
use rtnetlink::Handle;
use rtnetlink::packet_route::link::LinkAttribute;
use tokio::runtime::Runtime;

use self::messages::{address_from, link_from};
pub(super) use self::routes::Route;
use crate::error::{Error, Result};
use crate::link_name::LinkName;
use crate::mac::MacAddress;

/// A netlink socket in the network namespace of the thread that opened it.
pub(super) struct Links {
    runtime: Runtime,
    handle: Handle,
    /// Numbers of links that were looked up: each look waits for the kernel's one lock of all links.
    index_cache: RefCell<BTreeMap<LinkName, u32>>,
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
    /// For ports: whether the bridge learning from what comes out of it who is behind it.
    pub learning: bool,
    /// For bridges: whether ports are on VLANs (`vlan_filtering`).
    pub vlan_filtering: bool,
    /// For bridges: the VLAN that a new port is on.
    pub default_vlan: Option<u16>,
}

impl Links {
    pub fn open() -> Result<Self> {
        let fail = |error| Error::os("open a netlink socket", error);
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(fail)?;
        let inside = runtime.enter();
        let (connection, handle, _messages) =
            rtnetlink::new_connection_with_strict_check().map_err(fail)?;
        runtime.spawn(connection);
        drop(inside);
        Ok(Self { runtime, handle, index_cache: RefCell::default() })
    }

    /// The link called `name`.
    pub fn find(&self, name: &LinkName) -> Result<Option<Link>> {
        let found = self
            .runtime
            .block_on(self.handle.link().get().match_name(name.as_str()).execute().try_next());
        let message = unless(found.map(Some), Errno::ENODEV, None)
            .map_err(|e| failed(format!("look up link '{name}'"), e))?;
        let link = message.flatten().as_ref().map(link_from);
        if let Some(link) = &link {
            self.index_cache.borrow_mut().insert(name.clone(), link.index);
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
    pub fn clear_cache(&self) {
        self.index_cache.borrow_mut().clear();
    }

    /// The number that a link had at the last look. A link that has gone meanwhile is none of the kernel's.
    fn index(&self, name: &LinkName) -> Result<Option<u32>> {
        let known = self.index_cache.borrow().get(name).copied();
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

    /// The link number `index`.
    pub fn find_by_index(&self, index: u32) -> Result<Option<Link>> {
        let found =
            self.runtime.block_on(self.handle.link().get().match_index(index).execute().try_next());
        let found = unless(found, Errno::ENODEV, None);
        Ok(found.map_err(|e| failed(format!("look up link {index}"), e))?.as_ref().map(link_from))
    }

    /// Removes a link; `false` if it has gone already.
    pub fn delete(&self, name: &LinkName, index: u32) -> Result<bool> {
        let deleted = self.runtime.block_on(self.handle.link().del(index).execute());
        done_unless(deleted, Errno::ENODEV).map_err(|e| failed(format!("remove link '{name}'"), e))
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

fn errno(error: &rtnetlink::Error) -> Option<Errno> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(Errno::from_raw(message.raw_code().abs())),
        _ => None,
    }
}

/// `Ok(otherwise)` in place of the failure `expected`.
fn unless<T>(
    result: Result<T, rtnetlink::Error>,
    expected: Errno,
    otherwise: T,
) -> Result<T, rtnetlink::Error> {
    result.or_else(|error| if errno(&error) == Some(expected) { Ok(otherwise) } else { Err(error) })
}

/// Whether it was done; `false` for the failure `expected`.
fn done_unless(
    result: Result<(), rtnetlink::Error>,
    expected: Errno,
) -> Result<bool, rtnetlink::Error> {
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
