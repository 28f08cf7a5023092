//! Which addresses and host ports a new VM gets: chosen, and claimed before anything of it exists.

use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::time::Instant;

use ipnetwork::IpNetwork;

use super::Cpi;
use super::cloud_properties::{PortForward, VmCloudProperties};
use super::networks::{Addressing, Networks};
use super::placement::{Placed, Pool};
use crate::cid::VmCid;
use crate::error::{Error, ErrorKind, Result};
use crate::ranges::Protocol;
use crate::store::nic_rules::Forward;
use crate::store::record::{Keeper, Nic, Segment, Wire};
use crate::store::reservations::{Reservation, Reservations};

/// The most ports of the host one VM can have: each is an element of its own.
const MOST_PORTS: u32 = 1024;

impl Cpi {
    /// Claims the addresses and ports of the VM, choosing those of dynamic networks, and writes them into its cards and
    /// networks. If it fails, some may be claimed.
    pub(super) fn claim(
        &self,
        vm: &VmCid,
        placed: &mut [Placed],
        networks: &mut Networks,
        properties: &VmCloudProperties,
        deadline: Instant,
    ) -> Result<()> {
        self.store.with_reservations(deadline, |claims| {
            placed
                .iter_mut()
                .try_for_each(|placed| claim_addresses(vm, placed, networks, claims))?;
            properties
                .ports
                .iter()
                .try_for_each(|forward| claim_ports(vm, placed, networks, forward, claims))
        })
    }
}

fn claim_addresses(
    vm: &VmCid,
    placed: &mut Placed,
    networks: &mut Networks,
    claims: &mut Reservations<'_>,
) -> Result<()> {
    let Placed { nic, pool, .. } = placed;
    let network =
        networks.iter_mut().find(|network| network.name == nic.network).expect("a NIC is for one");
    let segment = match &nic.wire {
        Wire::Tap { segment, .. } => segment,
        Wire::User { user } => {
            // Nobody else is on that wire.
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
            let address = choose(pool, segment, claims)?;
            network.resolve(with_prefix(address, pool.subnet.prefix()), pool.gateway);
            vec![address.into()]
        }
    };
    for block in &blocks {
        let claim = Reservation::block(segment, *block);
        if let Some(holder) = claims.holder(&claim)? {
            let what = if is_one(*block) { block.ip().to_string() } else { block.to_string() };
            let message = format!("network '{}': {what} is held by VM '{holder}'", nic.network);
            return Err(Error::new(ErrorKind::Conflict, message).hint(format!(
                "if that VM is wanted no more, delete it: bosh delete-vm {holder}"
            )));
        }
        claims.reserve(vm, claim)?;
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

/// The address the instance had before, if it is free, else the first that is.
fn choose(pool: &Pool, segment: &Segment, claims: &mut Reservations<'_>) -> Result<IpAddr> {
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
        if claims.holder(&Reservation::block(segment, ip.into()))?.is_none() {
            return Ok(ip);
        }
    }
    let message = format!("host network '{}' has no free address", segment.network);
    Err(Error::new(ErrorKind::Conflict, message)
        .hint(format!("widen networks.{}.pool", segment.network)))
}

/// Claims the ports for the cards that have a way from the host: of each family the default one, or else the first.
fn claim_ports(
    vm: &VmCid,
    placed: &mut [Placed],
    networks: &Networks,
    wanted: &PortForward,
    claims: &mut Reservations<'_>,
) -> Result<()> {
    let guest = wanted.guest.unwrap_or(wanted.host);
    let count = wanted.host.count();
    if guest.count() != count || count > MOST_PORTS {
        let problem = format!(
            "cloud_properties.ports: host and guest must be as many ports, at most {MOST_PORTS}"
        );
        return Err(Error::new(ErrorKind::BadRequest, problem));
    }
    if let Some(ip) = wanted.address.filter(|ip| ip.is_unspecified() || ip.is_multicast()) {
        let problem = format!("cloud_properties.ports: {ip} is no address of a host");
        return Err(Error::new(ErrorKind::BadRequest, problem)
            .hint("leave 'address' out for every address of the host"));
    }
    let is_default = |nic: &Nic| {
        networks.iter().any(|network| {
            network.name == nic.network && network.default.iter().any(|d| d == "gateway")
        })
    };
    placed.sort_by_key(|placed| !is_default(&placed.nic));
    let found = forward_to(placed, wanted);
    placed.sort_by_key(|placed| placed.index);
    if found.is_empty() {
        let message =
            "cloud_properties.ports: the VM has no network whose packets go through this host";
        return Err(Error::new(ErrorKind::NotSupported, message).hint(
            "ports are forwarded to networks with a bridge of our own: profiles 'nat' and 'routed', and 'user'; from a \
             loopback address to 'user' alone",
        ));
    }
    for port in wanted.host.first..=wanted.host.last {
        let claim = Reservation::Port { protocol: wanted.protocol, port, address: wanted.address };
        if let Some(holder) = claims.holder(&claim)? {
            let message =
                format!("port {}/{port} of this host is held by VM '{holder}'", wanted.protocol);
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        claims.reserve(vm, claim)?;
        warn_if_used(wanted.protocol, port, wanted.address);
    }
    let (protocol, count) = (wanted.protocol.number(), u16::try_from(count).expect("at most 1024"));
    for (index, to) in found {
        let rules = placed[index].nic.rules.as_mut().expect("forwarded to");
        let (address, host, guest) = (wanted.address, wanted.host.first, guest.first);
        rules.forwards.push(Forward { address, protocol, host, to, guest, count });
    }
    Ok(())
}

/// The cards a forward leads to, by their place in the manifest, with the address there.
fn forward_to(placed: &[Placed], wanted: &PortForward) -> Vec<(usize, IpAddr)> {
    let address = |placed: &Placed| {
        let rules = placed.nic.rules.as_ref()?;
        let ip = match &placed.nic.wire {
            Wire::User { user } => Some(IpAddr::V4(user.guest)),
            Wire::Tap { segment, .. } => {
                let routed = matches!(&segment.keeper,
                    Keeper::Cpi { addresses, closed: false, .. } if !addresses.is_empty());
                // Packets to a loopback address reach no bridge.
                let loopback = wanted.address.is_some_and(|ip| ip.is_loopback());
                rules.addresses.first().filter(|_| routed && !loopback).map(IpNetwork::ip)
            }
        };
        Some((placed.index, ip?))
    };
    let mut found: Vec<(usize, IpAddr)> = Vec::new();
    for (index, ip) in placed.iter().filter_map(address) {
        let asked = wanted.address.is_none_or(|address| address.is_ipv4() == ip.is_ipv4());
        if asked && !found.iter().any(|(_, other)| other.is_ipv4() == ip.is_ipv4()) {
            found.push((index, ip));
        }
    }
    found
}

/// A program of the host that listens there hears nothing more from outside.
fn warn_if_used(protocol: Protocol, port: u16, address: Option<IpAddr>) {
    let at = (address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), port);
    let used = match protocol {
        Protocol::Tcp => TcpListener::bind(at).map(drop),
        Protocol::Udp => UdpSocket::bind(at).map(drop),
    };
    if used.is_err_and(|error| error.kind() == std::io::ErrorKind::AddrInUse) {
        tracing::warn!(%protocol, port, "a program of this host listens on a port that now leads to a VM");
    }
}
