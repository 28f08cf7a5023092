//! Makes the host what a [`Segment`] says, and plugs taps into it.
//!
//! ```text
//!            no bridge ──ensure──▶ bridge, rules ──plug──▶ … with a tap
//!                ▲                  │      ▲                   │
//!                └─────release──────┘      └─ the tap's fd is closed
//! ```
//! `ensure` compares with the kernel and does only what is missing; where nothing is, it costs a few messages.
//! Nothing else of the host changes, but `net.ipv4.ip_forward`, which is switched on and stays on: others may have
//! come to need it.
//!
//! Callers hold the network's lock from `ensure` or `plug` until the VM's record says so, and over `release`: the
//! kernel can not remove a bridge only if it has no port. All that happens without the lock (an operator, another
//! installation) is settled: what exists already or has gone already is looked at again.

use std::os::fd::OwnedFd;

use ipnetwork::IpNetwork;

use super::link::{Changes, Link, Links};
use super::plan::{Keeper, Segment, overlap};
use super::{firewall, sysctl, tap};
use crate::error::{Error, ErrorKind, Result};
use crate::link_name::LinkName;
use crate::mac::MacAddress;

/// How the alias of every link that we made begins.
const MARK: &str = "bosh-qemu-cpi:";
/// How often a bridge may change under our hands before we give up: once for each step of making it, and again.
const ATTEMPTS: u32 = 8;

/// A tap on its bridge.
#[derive(Debug)]
pub struct Plug {
    /// The tap, once for each queue: it is gone from the host when these and every copy of them are closed.
    pub queues: Vec<OwnedFd>,
    /// `/dev/vhost-net`, once for each queue; none where the host has no such device.
    pub vhost: Vec<OwnedFd>,
    /// Largest packet that the network carries, bytes; the guest must be told if it is not 1500.
    pub mtu: u32,
}

/// Makes the segment's bridge work, if it does not. Twice is once.
///
/// What it made before a failure stays: [`release`] removes it.
///
/// # Errors
/// [`ErrorKind::Conflict`] if the bridge or its subnet is somebody else's, with nothing changed;
/// [`ErrorKind::NetworkNotFound`] if the operator's bridge is not there; [`ErrorKind::Host`] for what the kernel
/// refused.
pub fn ensure(segment: &Segment) -> Result<()> {
    settle(segment, |links| bridge(links, segment)).map(drop)
}

/// Makes the tap `name` with so many queues and plugs it into the segment's bridge, which is [`ensure`]d first.
///
/// # Errors
/// As [`ensure`]; [`ErrorKind::Conflict`] if a link of that name exists.
pub fn plug(name: &LinkName, segment: &Segment, queues: usize) -> Result<Plug> {
    settle(segment, |links| {
        let Some(bridge) = bridge(links, segment)? else { return Ok(None) };
        let mtu = segment.mtu.unwrap_or(bridge.mtu);
        let taps = tap::create(name, queues)?;
        let port = Changes {
            mac: Some(tap::host_mac(name)),
            // Never smaller than the bridge's: a bridge shrinks to its smallest port.
            mtu: Some(bridge.mtu),
            controller: Some(bridge.index),
            up: true,
            ..Changes::default()
        };
        // The host has no business on this wire: no address of its own, no router discovery towards the guest.
        sysctl::ensure(&format!("ipv6/conf/{name}/disable_ipv6"), "1")?;
        let Some(link) = links.find(name)? else { return Ok(None) };
        match links.change(name, link.index, port) {
            Ok(true) => Ok(Some(Plug { vhost: tap::vhost(taps.len())?, queues: taps, mtu })),
            Ok(false) => Ok(None),
            // The kernel says EINVAL of a bridge that has gone.
            Err(_) if links.find(&segment.bridge)?.is_none_or(|now| now.index != bridge.index) => Ok(None),
            Err(error) => Err(error.during(format!("plug tap '{name}' into bridge '{}'", segment.bridge))),
        }
    })
}

/// Removes the segment's bridge and rules if they are ours and no port is left.
///
/// # Errors
/// [`ErrorKind::Host`] for what the kernel refused.
pub fn release(segment: &Segment) -> Result<()> {
    let Keeper::Us { .. } = segment.keeper else { return Ok(()) };
    let links = Links::open()?;
    if let Some(link) = links.find(&segment.bridge)?
        && is_ours(&link, &segment.bridge)
    {
        if links.has_ports(link.index)? {
            return Ok(());
        }
        tracing::info!(bridge = %segment.bridge, "removing a bridge without ports");
        links.delete(&segment.bridge, link.index)?;
    }
    firewall::drop_all(&segment.bridge)
}

/// Removes a tap that something keeps alive after its VM, if it is there.
///
/// # Errors
/// [`ErrorKind::Conflict`] if the link of that name is no tap.
pub fn remove_tap(name: &LinkName) -> Result<()> {
    let links = Links::open()?;
    let Some(link) = links.find(name)? else { return Ok(()) };
    if link.kind.as_deref() != Some("tun") {
        return Err(Error::new(ErrorKind::Conflict, format!("link '{name}' is not a tap")));
    }
    links.delete(name, link.index).map(drop)
}

/// Repeats `attempt`, on one socket, while it finds the host changing.
fn settle<T>(segment: &Segment, mut attempt: impl FnMut(&Links) -> Result<Option<T>>) -> Result<T> {
    let links = Links::open()?;
    for _ in 0..ATTEMPTS {
        if let Some(done) = attempt(&links)? {
            return Ok(done);
        }
    }
    Err(Error::new(ErrorKind::Conflict, format!("bridge '{}' keeps being removed by somebody else", segment.bridge)))
}

/// The bridge as it now works, or `None` if it must be looked at again.
fn bridge(links: &Links, segment: &Segment) -> Result<Option<Link>> {
    match &segment.keeper {
        Keeper::Operator => operators_bridge(links, segment).map(Some),
        Keeper::Us { addresses, masquerade, .. } => our_bridge(links, segment, addresses, *masquerade),
    }
}

fn operators_bridge(links: &Links, segment: &Segment) -> Result<Link> {
    let name = &segment.bridge;
    let wrong = |kind, problem: &str, hint: String| Error::new(kind, format!("bridge '{name}' {problem}")).hint(hint);
    let Some(link) = links.find(name)? else {
        let hint = format!("make it: ip link add {name} type bridge && ip link set {name} up");
        return Err(wrong(ErrorKind::NetworkNotFound, "does not exist", hint));
    };
    if link.kind.as_deref() != Some("bridge") {
        let kind = link.kind.as_deref().unwrap_or("hardware");
        let hint = format!("make a bridge and put it in: ip link add br0 type bridge && ip link set {name} master br0");
        return Err(wrong(ErrorKind::BadConfig, &format!("is a link, but no bridge: its kind is {kind}"), hint));
    }
    if !link.up {
        return Err(wrong(ErrorKind::Conflict, "is down", format!("switch it on: ip link set {name} up")));
    }
    if let Some(mtu) = segment.mtu.filter(|mtu| *mtu > link.mtu) {
        let problem = format!("carries packets of {} bytes, network '{}' wants {mtu}", link.mtu, segment.network);
        return Err(wrong(ErrorKind::BadConfig, &problem, format!("ip link set {name} mtu {mtu}")));
    }
    Ok(link)
}

fn our_bridge(links: &Links, segment: &Segment, addresses: &[IpNetwork], masquerade: bool) -> Result<Option<Link>> {
    let name = &segment.bridge;
    let found = links.find(name)?;
    if found.as_ref().is_some_and(|link| !is_ours(link, name)) {
        return Err(Error::new(ErrorKind::Conflict, format!("link '{name}' exists and is not ours"))
            .hint(format!("name another bridge for network '{}', or give it the profile 'bridge'", segment.network)));
    }
    let present = links.addresses()?;
    let (own, foreign): (Vec<_>, Vec<_>) =
        present.into_iter().partition(|(index, _)| found.as_ref().is_some_and(|link| link.index == *index));
    let missing: Vec<_> = addresses.iter().copied().filter(|wanted| !own.iter().any(|(_, a)| a == wanted)).collect();
    if let Some(other) = taken(&missing, &foreign) {
        // It may be that of the bridge, made by somebody else between our two looks.
        let unchanged = links.find(name)?.map(|link| link.index) == found.map(|link| link.index);
        return if unchanged { Err(refusal(segment, other)) } else { Ok(None) };
    }
    refuse_unrouted(addresses)?;

    let Some(link) = found else {
        tracing::info!(bridge = %name, network = segment.network, "making a bridge");
        links.add_bridge(name, pinned_mac(name), segment.mtu)?;
        return Ok(None);
    };
    ensure_ipv6_settings(name, addresses)?;
    let changes = changes(&link, segment);
    if changes != Changes::default() && !links.change(name, link.index, changes)? {
        return Ok(None);
    }
    for address in &missing {
        if !links.add_address(name, link.index, *address)? {
            return Ok(None);
        }
    }
    if addresses.iter().any(IpNetwork::is_ipv4) {
        sysctl::ensure("ipv4/ip_forward", "1")?;
    }
    if masquerade {
        // Of all its addresses, not only this segment's: manifests with several subnets share the bridge.
        firewall::ensure_masquerade(name, own.iter().map(|(_, a)| *a).chain(missing))?;
    }
    Ok(Some(Link { mtu: segment.mtu.unwrap_or(link.mtu), ..link }))
}

/// A bridge is made with its address in one step and marked in the next; whoever died in between left one that only
/// the address tells to be ours.
fn is_ours(link: &Link, name: &LinkName) -> bool {
    let marked = link.alias.as_ref().is_some_and(|alias| alias.starts_with(MARK));
    link.kind.as_deref() == Some("bridge") && (marked || link.mac == Some(pinned_mac(name)))
}

/// Set by hand, so that it does not follow the ports: guests have the gateway's address in their ARP tables.
fn pinned_mac(bridge: &LinkName) -> MacAddress {
    MacAddress::derived(0x02, "bridge", bridge.as_str())
}

fn changes(link: &Link, segment: &Segment) -> Changes {
    let mac = pinned_mac(&segment.bridge);
    let network: String = segment.network.chars().take(64).collect();
    Changes {
        alias: link.alias.is_none().then(|| format!("{MARK}{network}")),
        mac: (link.mac != Some(mac)).then_some(mac),
        mtu: segment.mtu.filter(|mtu| *mtu != link.mtu),
        controller: None,
        up: !link.up,
    }
}

/// The first of `missing` that shares addresses with another link's, and the other's.
fn taken(missing: &[IpNetwork], foreign: &[(u32, IpNetwork)]) -> Option<(IpNetwork, IpNetwork)> {
    let mut pairs = missing.iter().flat_map(|wanted| foreign.iter().map(|(_, other)| (*wanted, *other)));
    pairs.find(|(wanted, other)| overlap(*wanted, *other))
}

/// Two links with one subnet would cut the host off from whatever is behind the first.
fn refusal(segment: &Segment, (wanted, other): (IpNetwork, IpNetwork)) -> Error {
    let problem = format!("address {wanted} for bridge '{}' overlaps with the host's own {other}", segment.bridge);
    Error::new(ErrorKind::Conflict, problem).hint(format!(
        "VMs of that subnet belong on a bridge with the host's link: give network '{}' the profile 'bridge'; \
         or choose another subnet",
        segment.network
    ))
}

/// IPv6 forwarding is the operator's decision: switching it on makes the host deaf to router advertisements, by which
/// it may have its own default route (kernel, `Documentation/networking/ip-sysctl.rst`, accept_ra).
fn refuse_unrouted(addresses: &[IpNetwork]) -> Result<()> {
    const KEY: &str = "ipv6/conf/all/forwarding";
    if !addresses.iter().any(IpNetwork::is_ipv6) || sysctl::read(KEY)?.as_deref() == Some("1") {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Host, "this host does not forward IPv6").hint(
        "sysctl -w net.ipv6.conf.all.forwarding=1; first set accept_ra=2 on links whose routes come from router advertisements",
    ))
}

/// Before the bridge is up: a guest must not be able to make the host take addresses and routes from it.
fn ensure_ipv6_settings(name: &LinkName, addresses: &[IpNetwork]) -> Result<()> {
    let setting = |key: &str, value| sysctl::ensure(&format!("ipv6/conf/{name}/{key}"), value);
    setting("accept_ra", "0")?;
    if addresses.iter().any(IpNetwork::is_ipv6) {
        setting("disable_ipv6", "0")?;
        // Nobody else has the gateway's address, and it is wanted at once.
        return setting("accept_dad", "0");
    }
    Ok(())
}
