//! Links, addresses and routes over rtnetlink. Only this module uses the `rtnetlink` crate, whose
//! API changes often.
//!
//! A race is a result and no error: a change returns `false` if its link exists already or was
//! removed meanwhile.

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
    /// Indexes of links found so far: each query waits for the kernel's one lock of all links.
    index_cache: RefCell<BTreeMap<LinkName, u32>>,
}

/// A link as the kernel reports it.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Link {
    /// Its name, which may not be a valid [`LinkName`].
    pub name: String,
    /// Its index, which the kernel does not give another link before a reboot.
    pub index: u32,
    /// Its kind: `bridge`, `tun`, `veth`; `None` for hardware.
    pub kind: Option<String>,
    /// Its alias (`ip link set … alias`).
    pub alias: Option<String>,
    /// Its MAC address.
    pub mac: Option<MacAddress>,
    /// Largest packet, bytes.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
    /// Index of the bridge it is a port of.
    pub controller: Option<u32>,
    /// For bridge ports: whether the bridge learns MAC addresses from its frames.
    pub learning: bool,
    /// For bridge ports: the group addresses of bridges that it forwards, one bit for each.
    pub group_forward_mask: u16,
    /// For bridges: whether ports are on VLANs (`vlan_filtering`).
    pub vlan_filtering: bool,
    /// For bridges: the VLAN of a new port.
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

    /// Returns the link called `name`.
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

    /// Returns every link.
    pub fn all(&self) -> Result<Vec<Link>> {
        let links: Vec<_> = self
            .runtime
            .block_on(self.handle.link().get().execute().try_collect())
            .map_err(|e| failed("list the host's links".to_owned(), e))?;
        Ok(links.iter().map(link_from).collect())
    }

    /// Clears the cached indexes, because another process changes the links.
    pub fn clear_cache(&self) {
        self.index_cache.borrow_mut().clear();
    }

    /// Returns the index that a link had when it was last queried. If the link was removed
    /// meanwhile, the kernel refuses the index.
    fn index(&self, name: &LinkName) -> Result<Option<u32>> {
        let known = self.index_cache.borrow().get(name).copied();
        known.map_or_else(|| Ok(self.find(name)?.map(|link| link.index)), |index| Ok(Some(index)))
    }

    /// Returns the ports of the bridge `index`.
    pub fn ports(&self, index: u32) -> Result<Vec<Link>> {
        let mut request = self.handle.link().get();
        // Asks the kernel for these ports only; old kernels send all links.
        request.message_mut().attributes.push(LinkAttribute::Controller(index));
        let links: Vec<_> = self
            .runtime
            .block_on(request.execute().try_collect())
            .map_err(|e| failed("list the ports of a bridge".to_owned(), e))?;
        Ok(links.iter().map(link_from).filter(|link| link.controller == Some(index)).collect())
    }

    /// Returns the link with this index.
    pub fn find_by_index(&self, index: u32) -> Result<Option<Link>> {
        let found =
            self.runtime.block_on(self.handle.link().get().match_index(index).execute().try_next());
        let found = unless(found, Errno::ENODEV, None);
        Ok(found.map_err(|e| failed(format!("look up link {index}"), e))?.as_ref().map(link_from))
    }

    /// Removes a link. Returns `false` if it is already removed.
    pub fn delete(&self, name: &LinkName, index: u32) -> Result<bool> {
        let deleted = self.runtime.block_on(self.handle.link().del(index).execute());
        done_unless(deleted, Errno::ENODEV).map_err(|e| failed(format!("remove link '{name}'"), e))
    }

    /// Returns every address of the host with its link's index.
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

/// Replaces the error `expected` by `Ok(otherwise)`.
fn unless<T>(
    result: Result<T, rtnetlink::Error>,
    expected: Errno,
    otherwise: T,
) -> Result<T, rtnetlink::Error> {
    result.or_else(|error| if errno(&error) == Some(expected) { Ok(otherwise) } else { Err(error) })
}

/// Returns `true` on success and `false` for the error `expected`.
fn done_unless(
    result: Result<(), rtnetlink::Error>,
    expected: Errno,
) -> Result<bool, rtnetlink::Error> {
    unless(result.map(|()| true), expected, false)
}

/// Converts an error. The crate's own text of a kernel error repeats the message's bytes; the errno
/// is enough.
fn failed(doing: String, error: rtnetlink::Error) -> Error {
    match errno(&error) {
        Some(Errno::EPERM) => Error::os(doing, Errno::EPERM).hint(super::NEEDS_ROOT),
        Some(errno) => Error::os(doing, errno),
        None => Error::os(doing, io::Error::other(error)),
    }
}
