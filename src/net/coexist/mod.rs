//! Whether what else runs on this host lets our VMs' packets through: Docker, ufw, firewalld, libvirt, br_netfilter,
//! switches of the kernel, routes, addresses that are not here. Nothing of it is ever changed: a [`Finding`] names the cause
//! and the command that cures it.
//!
//! In nftables every table's chains are asked in turn, so an `accept` of ours can not take back a `drop` of another's.
//! [`observe`] looks, [`findings`] is pure.

mod firewalls;

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::Serialize;

use super::link::{Links, Route};
use super::nft::foreign::{self, Foreign};
use super::plan::{Keeper, Segment, is_default, overlap, subnet};
use super::{MARK, sysctl};
use crate::error::Result;
use crate::link_name::LinkName;
use crate::ranges::Protocol;
use crate::store::nic_rules::Forward;
use crate::store::record::Nic;

/// The bridge of Docker's default network.
const DOCKER: &str = "docker0";

/// What stands in the way of a network, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What is wrong, and who did it.
    pub cause: String,
    /// A command for a shell, or what to change.
    pub cure: String,
}

/// What this host is like, as far as it matters to others' packets.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Tables that have a say in what reaches the host or is forwarded.
    foreign: Vec<Foreign>,
    /// Whether `iptables-legacy` has a filter table, which can not be read over netlink.
    legacy_filter: bool,
    /// Whether frames from port to port of a bridge go through iptables, too.
    bridges_call_iptables: bool,
    /// The host forwards IPv6.
    forwards_v6: bool,
    /// The link to the world.
    world: Option<World>,
    /// Whether Docker's own bridge is there.
    has_docker: bool,
    /// Bridges that are there, with their largest packets.
    bridges: Vec<(String, u32)>,
    /// Routes to the segments' addresses with their links, without those of bridges of ours.
    routes: Vec<(String, IpNetwork)>,
    /// Addresses from which ports are forwarded and that no link has.
    absent: Vec<IpAddr>,
}

/// The link to the world.
#[derive(Debug, Clone, Default)]
struct World {
    link: String,
    mtu: u32,
    /// Whether what comes in by it is passed on.
    forwards_v4: bool,
}

/// Looks at the host of the calling thread, as far as it matters to these segments and to what is forwarded to these cards.
///
/// # Errors
/// [`ErrorKind::Host`](crate::error::ErrorKind::Host) if the kernel does not tell.
pub fn observe(segments: &[&Segment], nics: &[Nic]) -> Result<Facts> {
    let links = Links::open()?;
    let is =
        |key: &str, wanted: &str| sysctl::read(key).map(|value| value.as_deref() == Some(wanted));
    let world = match links.to_the_world()? {
        Some(link) => {
            let forwards_v4 = !is(&format!("ipv4/conf/{}/forwarding", link.name), "0")?
                || is("ipv4/ip_forward", "0")?;
            Some(World { forwards_v4, mtu: link.mtu, link: link.name })
        }
        None => None,
    };
    let mut bridges = Vec::new();
    for segment in segments {
        bridges.extend(links.find(&segment.bridge)?.map(|link| (link.name, link.mtu)));
    }
    let docker = LinkName::parse(DOCKER).expect("a link's name");
    Ok(Facts {
        foreign: foreign::tables()?,
        legacy_filter: std::fs::read_to_string("/proc/thread-self/net/ip_tables_names")
            .is_ok_and(|names| names.lines().any(|name| name == "filter")),
        has_docker: links.find(&docker)?.is_some(),
        bridges_call_iptables: is("bridge/bridge-nf-call-iptables", "1")?,
        forwards_v6: is("ipv6/conf/all/forwarding", "1")?,
        world,
        bridges,
        routes: others_routes(&links, segments)?,
        absent: forwarded(nics)
            .filter_map(|forward| forward.address)
            .filter(|ip| !links.is_local(*ip))
            .collect(),
    })
}

/// Routes to addresses of the segments over links that are not ours.
fn others_routes(links: &Links, segments: &[&Segment]) -> Result<Vec<(String, IpNetwork)>> {
    let ours: Vec<_> = segments
        .iter()
        .flat_map(|segment| addresses(segment))
        .map(|address| subnet(*address))
        .collect();
    let mut found = Vec::new();
    for Route { link, to } in links.routes()? {
        // The default route is for what nobody else has.
        if !is_default(to)
            && ours.iter().any(|subnet| overlap(*subnet, to))
            && let Some(index) = link
            && let Some(link) = links.numbered(index)?
            && !link.alias.is_some_and(|alias| alias.starts_with(MARK))
        {
            found.push((link.name, to));
        }
    }
    Ok(found)
}

fn addresses(segment: &Segment) -> &[IpNetwork] {
    match &segment.keeper {
        Keeper::Cpi { addresses, .. } => addresses,
        Keeper::Operator => &[],
    }
}

/// What is forwarded to these cards.
fn forwarded(nics: &[Nic]) -> impl Iterator<Item = &Forward> {
    nics.iter()
        .filter(|nic| nic.tap().is_some())
        .filter_map(|nic| nic.rules.as_ref())
        .flat_map(|rules| &rules.forwards)
}

/// What keeps a segment's VMs, which have these cards, from what its profile and their ports promise.
pub fn findings(segment: &Segment, nics: &[Nic], facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let passes = match &segment.keeper {
        Keeper::Cpi { addresses, closed, services, .. } => {
            if services.as_ref().is_some_and(|services| !services.is_empty()) {
                firewalls::services(segment, facts, &mut findings);
            }
            addresses.iter().for_each(|address| routes(segment, *address, facts, &mut findings));
            let passes = !closed && !addresses.is_empty();
            if passes {
                switches(segment, addresses, facts, &mut findings);
            }
            passes
        }
        Keeper::Operator => false,
    };
    if passes || facts.bridges_call_iptables && !segment.isolated {
        firewalls::findings(segment, passes, facts, &mut findings);
    }
    for forward in forwarded(nics) {
        findings.extend(
            forward.address.filter(|ip| facts.absent.contains(ip)).map(|ip| absent(forward, ip)),
        );
    }
    findings
}

/// Not refused: an address that wanders between hosts (VRRP, a floating address) is elsewhere now and may come later, and
/// the forward works as soon as it does.
fn absent(forward: &Forward, address: IpAddr) -> Finding {
    let Forward { protocol, host, to, count, .. } = forward;
    let protocol = Protocol::numbered(*protocol).map_or("", Protocol::as_str);
    let last = host.saturating_add(count.saturating_sub(1));
    let one = last == *host;
    let (ports, lead) = if one {
        (format!("port {protocol}/{host}"), "leads")
    } else {
        (format!("ports {protocol}/{host}-{last}"), "lead")
    };
    let link = if address.is_ipv4() { "LINK" } else { "LINK nodad" };
    Finding {
        cause: format!(
            "{ports} of {address} {lead} to {to}, but no link of this host has {address}"
        ),
        cure: format!("ip address add {address} dev {link}; nothing, if it comes by itself (VRRP)"),
    }
}

/// The kernel's own switches and sizes.
fn switches(
    segment: &Segment,
    addresses: &[IpNetwork],
    facts: &Facts,
    findings: &mut Vec<Finding>,
) {
    let bridge = &segment.bridge;
    if addresses.iter().any(IpNetwork::is_ipv6) && !facts.forwards_v6 {
        let cause = format!("this host does not forward IPv6, which VMs on bridge '{bridge}' have");
        findings
            .push(Finding { cause, cure: "sysctl -w net.ipv6.conf.all.forwarding=1".to_owned() });
    }
    let Some(world) = &facts.world else { return };
    if addresses.iter().any(IpNetwork::is_ipv4) && !world.forwards_v4 {
        let cause = format!(
            "this host forwards, but not what comes in by '{}': no answer reaches a VM",
            world.link
        );
        findings.push(Finding {
            cause,
            cure: format!(
                "sysctl -w {}=1",
                sysctl::name(&format!("ipv4/conf/{}/forwarding", world.link))
            ),
        });
    }
    let mtu = facts
        .bridges
        .iter()
        .find(|(name, _)| name == bridge.as_str())
        .map(|(_, mtu)| *mtu)
        .or(segment.mtu);
    if let Some(mtu) = mtu.filter(|mtu| *mtu > world.mtu) {
        let cause = format!(
            "bridge '{bridge}' carries packets of {mtu} bytes, the way to the world by '{}' {}: large packets may hang",
            world.link, world.mtu
        );
        let cure = format!(
            "ip link set {bridge} mtu {}; then reboot_vm its VMs, which are told when they start",
            world.mtu
        );
        findings.push(Finding { cause, cure });
    }
}

/// Routes of others to the same addresses: one of the two is cut off.
fn routes(segment: &Segment, address: IpNetwork, facts: &Facts, findings: &mut Vec<Finding>) {
    let ours = subnet(address);
    let elsewhere = facts
        .routes
        .iter()
        .filter(|(link, to)| link != segment.bridge.as_str() && overlap(*to, ours));
    for (link, to) in elsewhere {
        let whose = match link.as_str() {
            libvirt if libvirt.starts_with("virbr") => " of libvirt",
            docker if docker == DOCKER || docker.starts_with("br-") => " of Docker",
            _ => "",
        };
        let cause = format!(
            "subnet {ours} of bridge '{}' overlaps with {to}, which is routed to '{link}'{whose}",
            segment.bridge
        );
        let other = format!(
            "give network '{}' another subnet: 'ip route' shows those in use",
            segment.network
        );
        let cure = if whose == " of libvirt" {
            format!(
                "virsh net-destroy default && virsh net-autostart --disable default; or {other}"
            )
        } else {
            other
        };
        findings.push(Finding { cause, cure });
    }
}

#[cfg(test)]
mod tests;
