//! create_network.

use std::net::IpAddr;
use std::time::Instant;

use ipnetwork::IpNetwork;
use serde_json::{Map, Value, json};

use super::{delete, managed, reclaim};
use crate::cid::{Cid, NetworkCid};
use crate::cpi::context::Context;
use crate::cpi::contract::CreatedNetwork;
use crate::cpi::creation::{Creatable, Creation, pending};
use crate::cpi::properties::{ManagedNetworkCloudProperties, SubnetCloudProperties};
use crate::error::{Error, ErrorKind, Result};
use crate::host::clock;
use crate::net;
use crate::net::plan::{is_subnet_of, overlap};
use crate::schema::{Property, Redacted, Whole};
use crate::store::layout::SCHEMA;
use crate::store::record::{Keeper, NetworkRecord, Segment};
use crate::store::{Guard, Phase, Rank};

/// How many subnets of `managed_range` are tried.
const ATTEMPTS: usize = 256;

crate::document! {
    /// Argument of `create_network`.
    pub struct Subnet {
        /// Its addresses. Absent: a free subnet of `managed_range`.
        range: Option<IpNetwork>;
        /// Address of its router. Absent: the first address.
        gateway: Option<IpAddr>;
        /// Length of the netmask, if there is no `range`.
        netmask_bits: Option<Whole<1, 128>>;
        /// Cloud properties of the network.
        cloud_properties: ManagedNetworkCloudProperties =
            ManagedNetworkCloudProperties::absent().expect("every key has a default");
    }
}

/// Creates a managed network with a bridge of its own.
pub(in crate::cpi) fn create(cx: &Context, given: &Map<String, Value>) -> Result<CreatedNetwork> {
    let known = ["range", "gateway", "netmask_bits", "cloud_properties"];
    // The Director adds keys of its own.
    let ours = given.iter().filter(|(key, _)| known.contains(&key.as_str()));
    let ours = Value::Object(ours.map(|(key, value)| (key.clone(), value.clone())).collect());
    let subnet = Subnet::from_json(&ours).map_err(|e| e.in_request("subnet"))?;
    let deadline = cx.deadline("create_network");
    let creation = Creation::<NetworkRecord>::begin(cx, deadline)?;
    let mut answered = None;
    let work = |creation: &Creation<'_, NetworkRecord>| {
        let record = match subnet.range {
            Some(range) => make_in_given(cx, creation.cid(), &subnet, range)?,
            None => make_in_first_free(cx, creation.cid(), &subnet)?,
        };
        answered = Some(answer(&record)?);
        Ok(record)
    };
    creation.run(work, |error| error)?;
    Ok(answered.expect("the work answers"))
}

impl Creatable for NetworkRecord {
    fn roll_back(cx: &Context, cid: &NetworkCid, lock: Guard, _deadline: Instant) -> Result<()> {
        let lock = lock.into_short_lock();
        delete::remove(cx, cid)?;
        drop(lock);
        pending::remove(cx, cid)
    }
}

fn make_in_given(
    cx: &Context,
    cid: &NetworkCid,
    subnet: &Subnet,
    range: IpNetwork,
) -> Result<NetworkRecord> {
    if !net::plan::is_private(range) && !is_subnet_of(range, cx.config.managed_range) {
        let message =
            format!("subnet.range: {range} is neither private nor in this host's managed_range");
        return Err(Error::new(ErrorKind::BadRequest, message)
            .hint("if these addresses are yours, set managed_range in the configuration"));
    }
    make_in(cx, cid, subnet, range)
}

/// Makes the network in the first subnet of `managed_range` that is free.
fn make_in_first_free(cx: &Context, cid: &NetworkCid, subnet: &Subnet) -> Result<NetworkRecord> {
    let Some(bits) = subnet.netmask_bits else {
        let message = "subnet: give 'range', or 'netmask_bits' for a free range of this host";
        return Err(Error::new(ErrorKind::BadRequest, message));
    };
    let all = cx.config.managed_range;
    let configured: Vec<_> =
        cx.config.networks.values().filter_map(|network| network.subnet).collect();
    let free = subnets(all, bits.get() as u8)
        .filter(|range| !configured.iter().any(|other| overlap(*other, *range)));
    let mut refusal = None;
    for range in free.take(ATTEMPTS) {
        match make_in(cx, cid, subnet, range) {
            Err(error) if error.kind() == ErrorKind::Conflict => refusal = Some(error),
            made => return made,
        }
    }
    let message = format!("no subnet of /{} is free in {all}", bits.get());
    let none = Error::new(ErrorKind::Conflict, message);
    let error = refusal.map_or(none, |error| error.during(format!("find a free subnet in {all}")));
    Err(error
        .hint("set managed_range in the configuration to addresses that this host does not use"))
}

fn make_in(
    cx: &Context,
    cid: &NetworkCid,
    subnet: &Subnet,
    range: IpNetwork,
) -> Result<NetworkRecord> {
    let record = NetworkRecord {
        schema: SCHEMA,
        cid: cid.clone(),
        phase: Phase::Creating,
        created_at: clock::now(),
        director: cx.director.clone(),
        settings: settings(cid, subnet, range),
        newer: Map::new(),
    };
    let segment = managed::segment(cx, &record)?;
    let overlaps = |other: &str| {
        let message = format!("subnet {range} overlaps with managed network '{other}'");
        Error::new(ErrorKind::Conflict, message)
    };
    while let Some(other) = overlapping(cx, &segment, range)? {
        if !reclaim::reclaim(cx, &other)? {
            return Err(overlaps(&other));
        }
    }
    net::subnet_conflict::ensure_free(&segment)
        .map_err(|e| e.hint("choose a range that 'ip route' does not show"))?;
    // Of two creates that choose the same subnet at once, the second sees the record of the first.
    let ranges_lock =
        cx.store.short_lock(Rank::Reservations, "ranges", cx.deadline("create_network"))?;
    if let Some(other) = overlapping(cx, &segment, range)? {
        return Err(overlaps(&other));
    }
    cx.store.write(&record)?;
    drop(ranges_lock);
    cx.store.pin(&segment)?;
    net::apply::ensure(&segment, &[])?;
    net::bridge_owners::add_owner(&segment.bridge, &cx.store.state_dir_id()?)?;
    Ok(record)
}

/// The network as the configuration would describe it.
fn settings(cid: &NetworkCid, subnet: &Subnet, range: IpNetwork) -> Map<String, Value> {
    let first = || range.iter().nth(1).unwrap_or_else(|| range.network());
    let properties = &subnet.cloud_properties;
    let mut settings = json!({
        "profile": properties.profile,
        "bridge": NetworkRecord::bridge(cid),
        "subnet": range,
        "gateway": subnet.gateway.unwrap_or_else(first),
        "anti_spoof": properties.anti_spoof,
        "host_services": properties.host_services,
        "mtu": properties.mtu,
    });
    if let Some(pool) = properties.pool {
        settings["pool"] = json!(format!("{}-{}", pool.first, pool.last));
    }
    object(&settings)
}

/// The answer to the Director, which merges it into the subnet.
fn answer(record: &NetworkRecord) -> Result<CreatedNetwork> {
    let network = managed::settings(record)?;
    let addresses = json!({"range": network.subnet, "gateway": network.gateway, "reserved": []});
    let cloud_properties = json!({"network": record.cid, "anti_spoof": network.anti_spoof});
    debug_assert!(SubnetCloudProperties::from_json(&cloud_properties).is_ok());
    Ok(CreatedNetwork {
        cid: record.cid.clone(),
        addresses: object(&addresses),
        cloud_properties: Redacted(object(&cloud_properties)),
    })
}

fn object(value: &Value) -> Map<String, Value> {
    value.as_object().cloned().expect("an object")
}

/// Another managed network that has some of the addresses, with or without a bridge at the moment.
/// Pins are read, too: a record may be damaged.
fn overlapping(cx: &Context, segment: &Segment, range: IpNetwork) -> Result<Option<String>> {
    let mut used = Vec::new();
    for record in cx.store.list_readable::<NetworkRecord>()? {
        let subnet = managed::settings(&record)?.subnet;
        used.extend(subnet.map(|subnet| (record.cid.to_string(), subnet)));
    }
    for pin in cx.store.pins()? {
        let is_managed = NetworkCid::parse(&pin.network).is_ok();
        if let (true, Keeper::Cpi { addresses, .. }) = (is_managed, pin.keeper) {
            used.extend(addresses.into_iter().map(|subnet| (pin.network.clone(), subnet)));
        }
    }
    let mut others = used.into_iter().filter(|(network, _)| *network != segment.network);
    Ok(others.find(|(_, subnet)| overlap(*subnet, range)).map(|(other, _)| other))
}

/// The subnets of `all` with a netmask of `bits`, in order.
fn subnets(all: IpNetwork, bits: u8) -> impl Iterator<Item = IpNetwork> {
    // The Director gives the range of an IPv6 subnet.
    let (first, prefix) = match all {
        IpNetwork::V4(all) => (u32::from(all.network()), all.prefix()),
        IpNetwork::V6(_) => (0, 32),
    };
    let count = if (prefix.max(8)..=30).contains(&bits) { 1u32 << (bits - prefix) } else { 0 };
    let subnet = move |n: u32| IpAddr::V4((first + (n << (32 - u32::from(bits)))).into());
    (0..count).filter_map(move |n| IpNetwork::new(subnet(n), bits).ok())
}
