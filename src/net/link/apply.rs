//! Applies changes of links, of their addresses and of the routes that come with these.

use nix::errno::Errno;
use rtnetlink::packet_route::link::{
    BridgeStpState, BridgeVlanInfoFlags, InfoBridgePort, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{NeighbourFlags, NeighbourState};
use rtnetlink::{
    LinkBridge, LinkBridgePort, LinkBridgeVlan, LinkMessageBuilder, LinkUnspec, LinkVlan,
};

use super::routes::connected_route;
use super::{Links, done_unless, errno, failed, unless};
use crate::error::{Error, Result};
use crate::link_name::LinkName;
use crate::mac::MacAddress;
use crate::net::change::{ALL_GROUP_ADDRESSES, Change, LinkSettings};

type Done<T = ()> = Result<T, rtnetlink::Error>;

impl Links {
    /// Applies one change of a link, address or route. Returns `false` if its link exists already
    /// or was removed meanwhile.
    pub fn apply(&self, change: &Change) -> Result<bool> {
        let index = match subject(change) {
            None => 0,
            Some(name) => match self.index(name)? {
                Some(index) => index,
                None => return Ok(false),
            },
        };
        let done = match change {
            Change::AddBridge { name, mac, mtu } => {
                done_unless(self.add_bridge(name, *mac, *mtu), Errno::EEXIST)
            }
            Change::AddVlan { name, vlan, .. } => {
                done_unless(self.add_vlan(name, index, *vlan), Errno::EEXIST)
            }
            Change::SetLink { to, .. } => return self.set(index, to, change),
            Change::IsolatePort(_) => done_unless(self.isolate(index), Errno::ENODEV),
            Change::PinMac { mac, .. } => done_unless(self.pin_mac(index, *mac), Errno::ENODEV),
            Change::SetPortVlan { vlan, replaces, .. } => {
                done_unless(self.set_port_vlan(index, *vlan, *replaces), Errno::ENODEV)
            }
            Change::AddAddress { address, .. } => {
                let request = self.handle.address().add(index, address.ip(), address.prefix());
                done_unless(
                    unless(self.runtime.block_on(request.execute()), Errno::EEXIST, ()),
                    Errno::ENODEV,
                )
            }
            Change::AddRoute { address, .. } => {
                let request = self.handle.route().add(connected_route(index, *address));
                done_unless(
                    unless(self.runtime.block_on(request.execute()), Errno::EEXIST, ()),
                    Errno::ENODEV,
                )
            }
            Change::WriteSysctl { .. } | Change::ReplaceTable(_) => {
                unreachable!("neither is about links")
            }
        };
        done.map_err(|error| change_failed(change, error))
    }

    fn add_bridge(&self, name: &LinkName, mac: MacAddress, mtu: u32) -> Done {
        let bridge =
            LinkMessageBuilder::<LinkBridge>::new(name.as_str()).address(mac.octets().to_vec());
        let bridge = bridge.stp_state(BridgeStpState::Disabled).forward_delay(0).mtu(mtu);
        self.runtime.block_on(self.handle.link().add(bridge.build()).execute())
    }

    fn add_vlan(&self, name: &LinkName, carrier: u32, vlan: u16) -> Done {
        let link = LinkVlan::new(name.as_str(), carrier, vlan).build();
        self.runtime.block_on(self.handle.link().add(link).execute())
    }

    fn set(&self, index: u32, to: &LinkSettings, change: &Change) -> Result<bool> {
        let controller = match &to.controller {
            Some(bridge) => match self.index(bridge)? {
                Some(index) => Some((bridge, index)),
                None => return Ok(false),
            },
            None => None,
        };
        let message = settings(index, to, controller.map(|(_, index)| index));
        let changed = self.runtime.block_on(self.handle.link().set(message).execute());
        if let (Err(error), Some((bridge, known))) = (&changed, controller)
            // The kernel returns EINVAL for a bridge that was removed.
            && errno(error) == Some(Errno::EINVAL)
            && self.find(bridge)?.map(|link| link.index) != Some(known)
        {
            return Ok(false);
        }
        done_unless(changed, Errno::ENODEV).map_err(|error| change_failed(change, error))
    }

    fn isolate(&self, port: u32) -> Done {
        let port = LinkBridgePort::new(port).isolated(true).build();
        self.runtime.block_on(self.handle.link().change(port).execute())
    }

    fn pin_mac(&self, port: u32, mac: MacAddress) -> Done {
        let silent = LinkBridgePort::new(port)
            .learning(false)
            .append_info_data(InfoBridgePort::GroupFwdMask(ALL_GROUP_ADDRESSES));
        self.runtime.block_on(self.handle.link().change(silent.build()).execute())?;
        let known =
            self.handle.neighbours().add_bridge(port, &mac.octets()).state(NeighbourState::Noarp);
        let known = known.flags(NeighbourFlags::Controller | NeighbourFlags::Sticky).replace();
        self.runtime.block_on(known.execute())
    }

    /// Puts a port on one VLAN, untagged, and takes it off `replaces`.
    fn set_port_vlan(&self, port: u32, vlan: u16, replaces: Option<u16>) -> Done {
        let untagged = BridgeVlanInfoFlags::Pvid | BridgeVlanInfoFlags::Untagged;
        let message = LinkBridgeVlan::new(port).vlan(vlan, untagged).build();
        self.runtime.block_on(self.handle.link().set(message).execute())?;
        if let Some(other) = replaces {
            let message =
                LinkBridgeVlan::new(port).vlan(other, BridgeVlanInfoFlags::empty()).build();
            self.runtime.block_on(self.handle.link().del_with_message(message).execute())?;
        }
        Ok(())
    }
}

/// Returns the link that must exist for the change.
fn subject(change: &Change) -> Option<&LinkName> {
    match change {
        Change::AddBridge { .. } | Change::WriteSysctl { .. } | Change::ReplaceTable(_) => None,
        Change::AddVlan { carrier: link, .. }
        | Change::SetLink { link, .. }
        | Change::IsolatePort(link)
        | Change::PinMac { port: link, .. }
        | Change::SetPortVlan { port: link, .. }
        | Change::AddAddress { link, .. }
        | Change::AddRoute { link, .. } => Some(link),
    }
}

fn change_failed(change: &Change, error: rtnetlink::Error) -> Error {
    let errno = errno(&error);
    let error = failed(format!("'{change}'"), error);
    match (errno, change) {
        (Some(Errno::EOPNOTSUPP), Change::AddBridge { .. }) => error.hint("modprobe bridge"),
        (Some(Errno::EOPNOTSUPP), Change::AddVlan { .. }) => {
            error.hint("VLAN sub-interfaces need the kernel module: modprobe 8021q")
        }
        _ => error,
    }
}

fn settings(index: u32, to: &LinkSettings, controller: Option<u32>) -> LinkMessage {
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
