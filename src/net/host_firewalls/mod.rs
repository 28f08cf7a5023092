//! Finds what on this host stops VM packets: Docker, ufw, firewalld, libvirt, br_netfilter, kernel
//! settings, routes, and forwarded addresses that no link has. Changes nothing: a [`Finding`] names
//! the cause and the command that cures it.
//!
//! nftables consults the chains of every table in turn, so an `accept` in the CPI's tables cannot
//! undo another program's `drop`. [`observe`] reads the host's state; [`findings`] is pure.

mod tables;

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::Serialize;

use super::link::{Links, Route};
use super::nft::foreign::{self, ForeignTable};
use super::plan::{Keeper, Segment, is_default, overlap, subnet};
use super::{ALIAS_PREFIX, sysctl};
use crate::error::Result;
use crate::link_name::LinkName;
use crate::ranges::Protocol;
use crate::store::nic_rules::Forward;
use crate::store::record::Nic;

/// The bridge of Docker's default network.
const DOCKER: &str = "docker0";

/// An obstacle for a network's packets, and its cure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The problem, and the program or setting that causes it.
    pub cause: String,
    /// A shell command, or what to change.
    pub cure: String,
}

/// The host's state, as far as it matters to VM packets.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Other programs' tables with chains at the input or forward hook.
    foreign: Vec<ForeignTable>,
    /// Whether `iptables-legacy` has a filter table, which netlink cannot read.
    has_legacy_filter: bool,
    /// Whether frames between ports of a bridge go through iptables, too.
    bridges_call_iptables: bool,
    /// Whether the host forwards IPv6.
    forwards_v6: bool,
    /// The link of the default route.
    default_route: Option<DefaultRoute>,
    /// Whether Docker's own bridge exists.
    has_docker: bool,
    /// Existing bridges of the segments, with their MTUs in bytes.
    bridges: Vec<(String, u32)>,
    /// Routes to the segments' addresses and their links, without links that the CPI made.
    routes: Vec<(String, IpNetwork)>,
    /// Addresses whose ports are forwarded and that no link has.
    unassigned: Vec<IpAddr>,
}

/// The link of the default route.
#[derive(Debug, Clone, Default)]
struct DefaultRoute {
    link: String,
    mtu: u32,
    /// Whether the host forwards packets that come in by it.
    forwards_v4: bool,
}

/// Observes the host in the calling thread's network namespace, as far as it matters to these
/// segments and to the forwards of these NICs.
///
/// # Errors
/// [`ErrorKind::Host`](crate::error::ErrorKind::Host) if the kernel does not answer.
pub fn observe(segments: &[&Segment], nics: &[Nic]) -> Result<Facts> {
    let links = Links::open()?;
    let is =
        |key: &str, wanted: &str| sysctl::read(key).map(|value| value.as_deref() == Some(wanted));
    let default_route = match links.default_route_link()? {
        Some(link) => {
            let forwards_v4 = !is(&format!("ipv4/conf/{}/forwarding", link.name), "0")?
                || is("ipv4/ip_forward", "0")?;
            Some(DefaultRoute { forwards_v4, mtu: link.mtu, link: link.name })
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
        has_legacy_filter: std::fs::read_to_string("/proc/thread-self/net/ip_tables_names")
            .is_ok_and(|names| names.lines().any(|name| name == "filter")),
        has_docker: links.find(&docker)?.is_some(),
        bridges_call_iptables: is("bridge/bridge-nf-call-iptables", "1")?,
        forwards_v6: is("ipv6/conf/all/forwarding", "1")?,
        default_route,
        bridges,
        routes: foreign_routes(&links, segments)?,
        unassigned: forwards_of(nics)
            .filter_map(|forward| forward.address)
            .filter(|ip| !links.is_local(*ip))
            .collect(),
    })
}

/// Returns routes to addresses of the segments over links that the CPI did not make.
fn foreign_routes(links: &Links, segments: &[&Segment]) -> Result<Vec<(String, IpNetwork)>> {
    let subnets: Vec<_> = segments
        .iter()
        .flat_map(|segment| addresses(segment))
        .map(|address| subnet(*address))
        .collect();
    let mut found = Vec::new();
    for Route { link, to } in links.routes()? {
        // The default route applies only where no other route does.
        if !is_default(to)
            && subnets.iter().any(|subnet| overlap(*subnet, to))
            && let Some(index) = link
            && let Some(link) = links.find_by_index(index)?
            && !link.alias.is_some_and(|alias| alias.starts_with(ALIAS_PREFIX))
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

/// Returns the forwards to these NICs.
fn forwards_of(nics: &[Nic]) -> impl Iterator<Item = &Forward> {
    nics.iter()
        .filter(|nic| nic.tap().is_some())
        .filter_map(|nic| nic.rules.as_ref())
        .flat_map(|rules| &rules.forwards)
}

/// Returns what prevents a segment's VMs with these NICs from using what its profile and their
/// forwards promise.
pub fn findings(segment: &Segment, nics: &[Nic], facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let forwards = match &segment.keeper {
        Keeper::Cpi { addresses, closed, services, .. } => {
            if services.as_ref().is_some_and(|services| !services.is_empty()) {
                tables::host_services(segment, facts, &mut findings);
            }
            addresses
                .iter()
                .for_each(|address| overlapping_routes(segment, *address, facts, &mut findings));
            let forwards = !closed && !addresses.is_empty();
            if forwards {
                kernel_settings(segment, addresses, facts, &mut findings);
            }
            forwards
        }
        Keeper::Operator => false,
    };
    if forwards || facts.bridges_call_iptables && !segment.isolated {
        tables::findings(segment, forwards, facts, &mut findings);
    }
    for forward in forwards_of(nics) {
        findings.extend(
            forward
                .address
                .filter(|ip| facts.unassigned.contains(ip))
                .map(|ip| unassigned_address(forward, ip)),
        );
    }
    findings
}

/// Returns the finding for a forward from an address that no link has. The forward is not refused:
/// an address that moves between hosts (VRRP, a floating address) may come later, and the forward
/// works then.
fn unassigned_address(forward: &Forward, address: IpAddr) -> Finding {
    let Forward { protocol, host, to, count, .. } = forward;
    let protocol = Protocol::from_number(*protocol).map_or("", Protocol::as_str);
    let last = host.saturating_add(count.saturating_sub(1));
    let is_single = last == *host;
    let (ports, lead) = if is_single {
        (format!("port {protocol}/{host}"), "leads")
    } else {
        (format!("ports {protocol}/{host}-{last}"), "lead")
    };
    let link = if address.is_ipv4() { "LINK" } else { "LINK nodad" };
    Finding {
        cause: format!(
            "{ports} of {address} {lead} to {to}, but no link of this host has {address}"
        ),
        cure: format!(
            "ip address add {address} dev {link}; do nothing if VRRP assigns the address"
        ),
    }
}

/// Adds findings about kernel settings and MTUs.
fn kernel_settings(
    segment: &Segment,
    addresses: &[IpNetwork],
    facts: &Facts,
    findings: &mut Vec<Finding>,
) {
    let bridge = &segment.bridge;
    if addresses.iter().any(IpNetwork::is_ipv6) && !facts.forwards_v6 {
        let cause = format!("this host does not forward IPv6, but VMs on bridge '{bridge}' use it");
        findings
            .push(Finding { cause, cure: "sysctl -w net.ipv6.conf.all.forwarding=1".to_owned() });
    }
    let Some(default_route) = &facts.default_route else { return };
    if addresses.iter().any(IpNetwork::is_ipv4) && !default_route.forwards_v4 {
        let cause = format!(
            "this host does not forward packets from '{}', so no reply reaches a VM",
            default_route.link
        );
        findings.push(Finding {
            cause,
            cure: format!(
                "sysctl -w {}=1",
                sysctl::name(&format!("ipv4/conf/{}/forwarding", default_route.link))
            ),
        });
    }
    let mtu = facts
        .bridges
        .iter()
        .find(|(name, _)| name == bridge.as_str())
        .map(|(_, mtu)| *mtu)
        .or(segment.mtu);
    if let Some(mtu) = mtu.filter(|mtu| *mtu > default_route.mtu) {
        let cause = format!(
            "bridge '{bridge}' has an MTU of {mtu} bytes, but the default route's link '{}' only \
             {}: large packets may get lost",
            default_route.link, default_route.mtu
        );
        let cure = format!(
            "ip link set {bridge} mtu {}, then reboot its VMs: they read the MTU when they start",
            default_route.mtu
        );
        findings.push(Finding { cause, cure });
    }
}

/// Adds findings about other routes to the same addresses: one of the two networks is cut off.
fn overlapping_routes(
    segment: &Segment,
    address: IpNetwork,
    facts: &Facts,
    findings: &mut Vec<Finding>,
) {
    let own = subnet(address);
    let others = facts
        .routes
        .iter()
        .filter(|(link, to)| link != segment.bridge.as_str() && overlap(*to, own));
    for (link, to) in others {
        let owner = match link.as_str() {
            libvirt if libvirt.starts_with("virbr") => " of libvirt",
            docker if docker == DOCKER || docker.starts_with("br-") => " of Docker",
            _ => "",
        };
        let cause = format!(
            "subnet {own} of bridge '{}' overlaps with the route of {to} to '{link}'{owner}",
            segment.bridge
        );
        let other =
            format!("give network '{}' a subnet that 'ip route' does not list", segment.network);
        let cure = if owner == " of libvirt" {
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
