//! The addresses and host ports of a new VM: chosen, and reserved before anything of the VM exists.

use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::time::Instant;

use ipnetwork::IpNetwork;

use crate::cid::VmCid;
use crate::cpi::context::Context;
use crate::cpi::contract::networks::{Addressing, Networks};
use crate::cpi::network::nics::{AddressPool, PlannedNic};
use crate::cpi::properties::{PortForward, VmCloudProperties};
use crate::error::{Error, ErrorKind, Result};
use crate::ranges::Protocol;
use crate::store::nic_rules::Forward;
use crate::store::record::{Keeper, Nic, Segment, Wire};
use crate::store::reservations::{Reservation, Reservations};

/// How many host ports one VM can have. Each is one element of an nftables set.
const MAX_PORTS: u32 = 1024;

/// Refuses ports that no VM can have, and ports of this host that the request gives twice.
pub(in crate::cpi) fn ensure_valid_ports(forwards: &[PortForward]) -> Result<()> {
    let ports: u64 = forwards.iter().map(|forward| u64::from(forward.host.count())).sum();
    if ports > u64::from(MAX_PORTS) {
        let problem = format!("cloud_properties.ports: {ports} ports, the limit is {MAX_PORTS}");
        return Err(Error::new(ErrorKind::BadRequest, problem));
    }
    for (index, forward) in forwards.iter().enumerate() {
        let count = forward.host.count();
        if forward.guest.is_some_and(|guest| guest.count() != count) {
            let problem =
                "cloud_properties.ports: give the same number of ports for host and guest";
            return Err(Error::new(ErrorKind::BadRequest, problem));
        }
        if let Some(ip) = forward.address.filter(|ip| ip.is_unspecified() || ip.is_multicast()) {
            let problem = format!("cloud_properties.ports: {ip} is not an address of a host");
            return Err(Error::new(ErrorKind::BadRequest, problem)
                .hint("leave 'address' out to listen on every address of the host"));
        }
        let shared = |(other, earlier)| Some((other, shared_port(earlier, forward)?));
        if let Some((other, port)) = forwards[..index].iter().enumerate().find_map(shared) {
            let problem = format!(
                "cloud_properties.ports: entries {other} and {index} both forward port {}/{port} \
                 of this host",
                forward.protocol
            );
            return Err(Error::new(ErrorKind::BadRequest, problem)
                .hint("forward each port of the host once"));
        }
    }
    Ok(())
}

/// The first port of the host that is in both.
fn shared_port(one: &PortForward, other: &PortForward) -> Option<u16> {
    let first = one.host.first.max(other.host.first);
    let at = |forward: &PortForward| port_reservation(forward, first);
    (first <= one.host.last.min(other.host.last) && at(one).overlaps(&at(other))).then_some(first)
}

fn port_reservation(forward: &PortForward, port: u16) -> Reservation {
    Reservation::Port { protocol: forward.protocol, port, address: forward.address }
}

/// Reserves the addresses and ports of the VM, chooses those of dynamic networks, and writes them
/// into its NICs and networks. A failure leaves no reservation, so that creates that wait for each
/// other's VM reserve nothing meanwhile.
pub(in crate::cpi) fn reserve(
    cx: &Context,
    vm: &VmCid,
    nics: &mut [PlannedNic],
    networks: &mut Networks,
    properties: &VmCloudProperties,
    deadline: Instant,
) -> Result<()> {
    cx.store.with_reservations(deadline, |reservations| {
        let reserved = reserve_all(vm, nics, networks, properties, reservations);
        if reserved.is_err() {
            cx.store.release_reservations(vm)?;
            for PlannedNic { nic, pool, .. } in nics {
                let Some(rules) = &mut nic.rules else { continue };
                rules.forwards.clear();
                if pool.is_some() {
                    rules.addresses.clear();
                }
            }
        }
        reserved
    })
}

/// The given addresses are reserved before any is chosen: a choice must not take one of them.
fn reserve_all(
    vm: &VmCid,
    nics: &mut [PlannedNic],
    networks: &mut Networks,
    properties: &VmCloudProperties,
    reservations: &mut Reservations<'_>,
) -> Result<()> {
    let (given, chosen): (Vec<_>, Vec<_>) =
        nics.iter_mut().partition(|planned| planned.pool.is_none());
    given
        .into_iter()
        .chain(chosen)
        .try_for_each(|planned| reserve_addresses(vm, planned, networks, reservations))?;
    properties
        .ports
        .iter()
        .try_for_each(|forward| reserve_ports(vm, nics, networks, forward, reservations))
}

fn reserve_addresses(
    vm: &VmCid,
    planned: &mut PlannedNic,
    networks: &mut Networks,
    reservations: &mut Reservations<'_>,
) -> Result<()> {
    let PlannedNic { nic, pool, .. } = planned;
    let network =
        networks.iter_mut().find(|network| network.name == nic.network).expect("a NIC is for one");
    let segment = match &nic.wire {
        Wire::Tap { segment, .. } => segment,
        Wire::User { user } => {
            // The VM is alone on QEMU's user network: nothing is reserved.
            if matches!(network.addressing, Addressing::Dynamic { .. }) {
                network.resolve(
                    with_prefix(user.guest.into(), user.gateway.prefix()),
                    Some(user.gateway.ip().into()),
                );
            }
            return Ok(());
        }
    };
    let Some(rules) = &mut nic.rules else { return Ok(()) };
    let blocks = match pool {
        None => rules.addresses.clone(),
        Some(pool) => {
            let address = choose(pool, segment, reservations)?;
            network.resolve(with_prefix(address, pool.subnet.prefix()), pool.gateway);
            vec![address.into()]
        }
    };
    for block in &blocks {
        let reservation = Reservation::block(segment, *block);
        if let Some(holder) = reservations.holder(&reservation)? {
            let what = if is_one(*block) { block.ip().to_string() } else { block.to_string() };
            let message = format!("network '{}': {what} is reserved by VM '{holder}'", nic.network);
            return Err(Error::new(ErrorKind::Conflict, message)
                .hint(format!("if that VM is not needed, delete it: `bosh delete-vm {holder}`")));
        }
        reservations.reserve(vm, reservation)?;
    }
    rules.addresses = blocks;
    Ok(())
}

fn with_prefix(ip: IpAddr, prefix: u8) -> IpNetwork {
    IpNetwork::new(ip, prefix).expect("an address of the subnet")
}

fn is_one(block: IpNetwork) -> bool {
    block.prefix() == if block.is_ipv4() { 32 } else { 128 }
}

/// The address that the instance had before, if it is free, else the first free one.
fn choose(
    pool: &AddressPool,
    segment: &Segment,
    reservations: &mut Reservations<'_>,
) -> Result<IpAddr> {
    let own = match &segment.keeper {
        Keeper::Cpi { addresses, .. } => addresses.iter().map(IpNetwork::ip).collect(),
        Keeper::Operator => Vec::new(),
    };
    let last = pool.subnet.is_ipv4() && pool.subnet.prefix() < 31;
    let usable = |ip: &IpAddr| {
        pool.subnet.contains(*ip)
            && *ip != pool.subnet.network()
            && !(last && *ip == pool.subnet.broadcast())
            && pool.gateway != Some(*ip)
            && !own.contains(ip)
    };
    for ip in pool
        .previous
        .filter(|ip| pool.range.contains(*ip))
        .into_iter()
        .chain(pool.range.addresses())
        .filter(usable)
    {
        if reservations.holder(&Reservation::block(segment, ip.into()))?.is_none() {
            return Ok(ip);
        }
    }
    let message = format!("host network '{}' has no free address", segment.network);
    Err(Error::new(ErrorKind::Conflict, message)
        .hint(format!("widen networks.{}.pool", segment.network)))
}

/// Reserves the ports for the NICs that the host reaches: of each address family the default NIC,
/// else the first.
fn reserve_ports(
    vm: &VmCid,
    nics: &mut [PlannedNic],
    networks: &Networks,
    wanted: &PortForward,
    reservations: &mut Reservations<'_>,
) -> Result<()> {
    let is_default = |nic: &Nic| {
        networks.iter().any(|network| {
            network.name == nic.network && network.default.iter().any(|d| d == "gateway")
        })
    };
    nics.sort_by_key(|planned| !is_default(&planned.nic));
    let found = forward_to(nics, wanted);
    nics.sort_by_key(|planned| planned.index);
    if found.is_empty() {
        let message =
            "cloud_properties.ports: the VM has no network that this host forwards ports to";
        return Err(Error::new(ErrorKind::NotSupported, message).hint(
            "ports are forwarded to networks with profile 'nat', 'routed' or 'user'; from a \
             loopback address only to 'user'",
        ));
    }
    for port in wanted.host.first..=wanted.host.last {
        let reservation = port_reservation(wanted, port);
        if let Some(holder) = reservations.holder(&reservation)? {
            let message = format!(
                "port {}/{port} of this host is reserved by VM '{holder}'",
                wanted.protocol
            );
            return Err(Error::new(ErrorKind::Conflict, message)
                .hint("choose another port in 'ports', or delete that VM"));
        }
        reservations.reserve(vm, reservation)?;
        warn_if_used(wanted.protocol, port, wanted.address);
    }
    let count = u16::try_from(wanted.host.count()).expect("at most 1024");
    let (protocol, guest) = (wanted.protocol.number(), wanted.guest.unwrap_or(wanted.host).first);
    for (index, to) in found {
        let rules = nics[index].nic.rules.as_mut().expect("forwarded to");
        let (address, host) = (wanted.address, wanted.host.first);
        rules.forwards.push(Forward { address, protocol, host, to, guest, count });
    }
    Ok(())
}

/// The NICs that a forward leads to, by their position in the manifest, with the address there.
fn forward_to(nics: &[PlannedNic], wanted: &PortForward) -> Vec<(usize, IpAddr)> {
    let address = |planned: &PlannedNic| {
        let rules = planned.nic.rules.as_ref()?;
        let ip = match &planned.nic.wire {
            Wire::User { user } => Some(IpAddr::V4(user.guest)),
            Wire::Tap { segment, .. } => {
                let routed = matches!(&segment.keeper,
                    Keeper::Cpi { addresses, closed: false, .. } if !addresses.is_empty());
                // The kernel routes no packet from a loopback address to a bridge.
                let loopback = wanted.address.is_some_and(|ip| ip.is_loopback());
                rules.addresses.first().filter(|_| routed && !loopback).map(IpNetwork::ip)
            }
        };
        Some((planned.index, ip?))
    };
    let mut found: Vec<(usize, IpAddr)> = Vec::new();
    for (index, ip) in nics.iter().filter_map(address) {
        let asked = wanted.address.is_none_or(|address| address.is_ipv4() == ip.is_ipv4());
        if asked && !found.iter().any(|(_, other)| other.is_ipv4() == ip.is_ipv4()) {
            found.push((index, ip));
        }
    }
    found
}

/// Warns if a program of the host listens on the port: it receives no more connections from
/// outside.
fn warn_if_used(protocol: Protocol, port: u16, address: Option<IpAddr>) {
    let at = (address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), port);
    let used = match protocol {
        Protocol::Tcp => TcpListener::bind(at).map(drop),
        Protocol::Udp => UdpSocket::bind(at).map(drop),
    };
    if used.is_err_and(|error| error.kind() == std::io::ErrorKind::AddrInUse) {
        let message = "a program of this host listens on a port that is now forwarded to a VM";
        tracing::warn!(%protocol, port, "{message}");
    }
}
