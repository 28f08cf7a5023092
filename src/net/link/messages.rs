//! Reads links and addresses from the kernel's messages.

use ipnetwork::IpNetwork;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{
    InfoBridge, InfoBridgePort, InfoData, InfoPortData, LinkAttribute, LinkFlags, LinkInfo,
    LinkMessage,
};

use super::Link;
use crate::mac::MacAddress;

pub(super) fn link_from(message: &LinkMessage) -> Link {
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
                    link.learning = settings.contains(&InfoBridgePort::Learning(true));
                    link.group_forward_mask = settings
                        .iter()
                        .find_map(|setting| match setting {
                            InfoBridgePort::GroupFwdMask(mask) => Some(*mask),
                            _ => None,
                        })
                        .unwrap_or_default();
                }
                LinkInfo::Kind(kind) => link.kind = Some(kind.to_string()),
                LinkInfo::Data(InfoData::Bridge(settings)) => {
                    settings.iter().for_each(|setting| match setting {
                        InfoBridge::VlanFiltering(on) => link.vlan_filtering = *on,
                        InfoBridge::VlanDefaultPvid(vlan) => {
                            link.default_vlan = Some(*vlan).filter(|vlan| *vlan > 0);
                        }
                        _ => {}
                    });
                }
                _ => {}
            }),
            _ => {}
        }
    }
    link
}

/// IPv4 has the host's address in `Local` (`Address` is the peer's on point-to-point links), IPv6
/// in `Address`.
pub(super) fn address_from(message: &AddressMessage) -> Option<(u32, IpNetwork)> {
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
