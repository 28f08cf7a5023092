//! create_network, delete_network: networks that the Director has made for `managed: true`.
//!
//! A managed network is one as the configuration could have it, kept in a record of its own, with a bridge named after
//! its cid. The bridge is pinned: it stays without VMs until delete_network.

use std::net::IpAddr;
use std::time::Instant;

use ipnetwork::IpNetwork;
use serde_json::{Map, Value, json};

use super::Cpi;
use super::cloud_properties::{ManagedNetworkCloudProperties, SubnetCloudProperties};
use super::placement::Placed;
use super::verbs::CreatedNetwork;
use crate::cid::{Cid, NetworkCid};
use crate::config;
use crate::error::{Error, ErrorKind, Result};
use crate::host::clock;
use crate::net::plan::{lies_in, overlap};
use crate::net::{self, profile::Profile};
use crate::schema::{Property, Redacted, Whole};
use crate::store::layout::SCHEMA;
use crate::store::record::{Keeper, NetworkRecord, Segment};
use crate::store::{Phase, Rank, ShortLock, atomic};

/// How many subnets are tried when the choice is ours.
const ATTEMPTS: usize = 256;

crate::document! {
    /// Argument of `create_network`.
    pub struct Subnet {
        /// Its addresses. Absent: the CPI chooses.
        range: Option<IpNetwork>;
        /// Its router's address. Absent: the first.
        gateway: Option<IpAddr>;
        /// Length of the netmask, where the CPI chooses.
        netmask_bits: Option<Whole<1, 128>>;
        /// What it may ask for.
        cloud_properties: ManagedNetworkCloudProperties =
            ManagedNetworkCloudProperties::absent().expect("every key has a default");
    }
}

impl Cpi {
    pub(super) fn make_managed(&self, given: &Map<String, Value>) -> Result<CreatedNetwork> {
        let known = ["range", "gateway", "netmask_bits", "cloud_properties"];
        // The Director may say more of a subnet than what is the CPI's.
        let ours = given.iter().filter(|(key, _)| known.contains(&key.as_str()));
        let ours = Value::Object(ours.map(|(key, value)| (key.clone(), value.clone())).collect());
        let subnet = Subnet::from_json(&ours).map_err(|e| e.in_request("subnet"))?;
        let deadline = self.deadline("create_network");
        self.store.prepare()?;
        self.clear_leftovers(deadline);
        let cid = self.new_cid::<NetworkRecord>()?;
        let lock = self
            .begin_under::<NetworkRecord>(Rank::Network, bridge(&cid), &cid, deadline)?
            .into_short_lock();
        let made = self.make_first_free(&cid, &subnet);
        if let Err(error) = &made {
            self.unmake_network(&cid).map_err(|e| e.during(format!("undo: {}", error.report())))?;
        }
        drop(lock);
        self.settled(&cid)?;
        made
    }

    /// Makes the network in its own range, or in the first of ours in which it can be.
    fn make_first_free(&self, cid: &NetworkCid, subnet: &Subnet) -> Result<CreatedNetwork> {
        if let Some(range) = subnet.range {
            if !net::plan::is_private(range) && !lies_in(range, self.config.managed_range) {
                let problem = format!(
                    "subnet.range: {range} is neither private nor in this host's managed_range"
                );
                return Err(Error::new(ErrorKind::BadRequest, problem).hint(
                    "if its addresses are yours to give, set managed_range in the configuration",
                ));
            }
            return self.make_in(cid, subnet, range);
        }
        let Some(bits) = subnet.netmask_bits else {
            return Err(Error::new(
                ErrorKind::BadRequest,
                "subnet: give 'range', or 'netmask_bits' for one of our choice",
            ));
        };
        let all = self.config.managed_range;
        let taken: Vec<_> =
            self.config.networks.values().filter_map(|network| network.subnet).collect();
        let free = subnets(all, bits.get() as u8)
            .filter(|range| !taken.iter().any(|t| overlap(*t, *range)));
        let mut refusal = None;
        for range in free.take(ATTEMPTS) {
            match self.make_in(cid, subnet, range) {
                Err(error) if error.kind() == ErrorKind::Conflict => refusal = Some(error),
                made => return made,
            }
        }
        let none = Error::new(
            ErrorKind::Conflict,
            format!("no subnet of /{} is free in {all}", bits.get()),
        );
        Err(refusal
            .map_or(none, |error| error.during(format!("find a free subnet in {all}")))
            .hint(
                "set managed_range in the configuration to addresses that this host does not use",
            ))
    }

    fn make_in(
        &self,
        cid: &NetworkCid,
        subnet: &Subnet,
        range: IpNetwork,
    ) -> Result<CreatedNetwork> {
        let gateway =
            subnet.gateway.or_else(|| range.iter().nth(1)).unwrap_or_else(|| range.network());
        let properties = &subnet.cloud_properties;
        let mut settings = json!({
            "profile": properties.profile, "bridge": bridge(cid), "subnet": range, "gateway": gateway,
            "anti_spoof": properties.anti_spoof, "host_services": properties.host_services, "mtu": properties.mtu,
        });
        if let Some(pool) = properties.pool {
            settings["pool"] = json!(format!("{}-{}", pool.first, pool.last));
        }
        let settings = settings.as_object().cloned().expect("an object");
        let (phase, created_at, newer) = (Phase::Creating, clock::now(), Map::new());
        let director = self.director.clone();
        let mut record = NetworkRecord {
            schema: SCHEMA,
            cid: cid.clone(),
            phase,
            created_at,
            director,
            settings,
            newer,
        };
        let segment = self.managed_segment(&record)?;
        let overlaps = |other: &str| {
            let problem =
                format!("the subnet {range} overlaps with that of the managed network '{other}'");
            Error::new(ErrorKind::Conflict, problem)
        };
        while let Some(other) = self.overlapping(&segment, range)? {
            if !self.unmake_if_forgotten(&other)? {
                return Err(overlaps(&other));
            }
        }
        net::taken::refuse(&segment)
            .map_err(|e| e.hint("choose a range that 'ip route' does not show"))?;
        // Of two that choose the same at once, the second sees the first.
        let choosing =
            self.store.short_lock(Rank::Reservations, "ranges", self.deadline("create_network"))?;
        if let Some(other) = self.overlapping(&segment, range)? {
            return Err(overlaps(&other));
        }
        self.store.write(&record)?;
        drop(choosing);
        self.store.pin(&segment)?;
        net::apply::ensure(&segment, &[])?;
        net::kept::keep(&segment.bridge, &self.store.state_dir_id()?)?;
        self.untold::<NetworkRecord>(cid)?;
        record.phase = Phase::Ready;
        self.store.write(&record)?;
        let addresses =
            json!({"range": range.to_string(), "gateway": gateway.to_string(), "reserved": []});
        let cloud_properties = json!({"network": cid, "anti_spoof": properties.anti_spoof});
        let object = |value: Value| value.as_object().cloned().expect("an object");
        debug_assert!(SubnetCloudProperties::from_json(&cloud_properties).is_ok());
        let cloud_properties = Redacted(object(cloud_properties));
        Ok(CreatedNetwork { cid: cid.clone(), addresses: object(addresses), cloud_properties })
    }

    /// A managed network that has some of the addresses. It may have no bridge now, if somebody took it away. They are asked
    /// for by their pins, too: a network's record may be damaged.
    fn overlapping(&self, segment: &Segment, range: IpNetwork) -> Result<Option<String>> {
        let mut taken = Vec::new();
        for record in self.store.list_readable::<NetworkRecord>()? {
            taken.extend(config(&record)?.subnet.map(|subnet| (record.cid.to_string(), subnet)));
        }
        for pin in
            self.store.pins()?.into_iter().filter(|pin| NetworkCid::parse(&pin.network).is_ok())
        {
            let Keeper::Cpi { addresses, .. } = pin.keeper else { continue };
            taken.extend(addresses.into_iter().map(|subnet| (pin.network.clone(), subnet)));
        }
        let mut others = taken.into_iter().filter(|(network, _)| *network != segment.network);
        Ok(others.find(|(_, taken)| overlap(*taken, range)).map(|(other, _)| other))
    }

    /// Unmakes a network that nobody is to have: one that is half made or half removed, and one that its Director was never
    /// told of and whose addresses it now gives to another. Whether it was such a one.
    fn unmake_if_forgotten(&self, network: &str) -> Result<bool> {
        let Ok(cid) = NetworkCid::parse(network) else { return Ok(false) };
        // Who works on it knows it.
        let lock = match self.store.short_lock(Rank::Network, bridge(&cid), Instant::now()) {
            Err(error) if error.kind() == ErrorKind::Timeout => return Ok(false),
            lock => lock?,
        };
        let Ok(Some(record)) = self.store.read::<NetworkRecord>(&cid) else { return Ok(false) };
        let ours = record.director.is_some() && record.director == self.director;
        if record.phase == Phase::Ready && !(ours && self.is_untold::<NetworkRecord>(&cid)?) {
            return Ok(false);
        }
        tracing::warn!(%cid, "removing a network that nobody was told of, or that is gone, and whose range is wanted");
        match self.unmake_unused(&cid, record, lock) {
            Err(used) if used.kind() == ErrorKind::Conflict => return Ok(false),
            unmade => unmade?,
        }
        self.settled(&cid).map(|()| true)
    }

    fn managed_segment(&self, record: &NetworkRecord) -> Result<Segment> {
        let network = config(record)?;
        let profile = Profile::load(&network.profile, self.config.network_profiles_dir.as_deref())
            .map_err(|e| e.with_kind(ErrorKind::BadRequest))?;
        if profile.wire != net::profile::Wiring::OwnBridge {
            let problem =
                format!("a managed network can not have the profile '{}'", network.profile);
            return Err(Error::new(ErrorKind::BadRequest, problem)
                .hint("one with a bridge of our own: nat, routed, isolated"));
        }
        net::plan::standing(record.cid.as_str(), &network, &profile)?
            .ok_or_else(|| Error::new(ErrorKind::Internal, "a managed network without a bridge"))
    }

    /// The managed network, as the configuration would have it.
    pub(super) fn managed(&self, cid: &NetworkCid) -> Result<config::Network> {
        let record =
            self.store.find::<NetworkRecord>(cid)?.filter(|record| record.phase == Phase::Ready);
        record.as_ref().map_or_else(|| Err(not_found(cid)), config)
    }

    /// Whether the managed networks of cards whose addresses are claimed are still there. Whoever deletes one says so
    /// before it looks for claims, so one of the two sees the other.
    pub(super) fn still_managed(&self, placed: &[Placed]) -> Result<()> {
        placed.iter().filter_map(|placed| placed.managed.as_ref()).try_for_each(|cid| {
            self.managed(cid)?;
            self.is_told::<NetworkRecord>(cid);
            Ok(())
        })
    }

    pub(super) fn remove_managed(&self, cid: &NetworkCid) -> Result<()> {
        if !atomic::entry_exists(&self.store.record_dir::<NetworkRecord>(cid)) {
            self.store.ensure_mounted()?;
            return Err(not_found(cid));
        }
        let deadline = self.deadline("delete_network");
        let lock = self.store.short_lock(Rank::Network, bridge(cid), deadline)?;
        let Some(record) = self.store.find::<NetworkRecord>(cid)? else {
            // An empty directory, at most: the last step of a removal.
            self.store.remove::<NetworkRecord>(cid)?;
            return Err(not_found(cid));
        };
        self.unmake_unused(cid, record, lock)
    }

    /// Unmakes a network that no VM uses.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if one does: then the network is whole.
    fn unmake_unused(
        &self,
        cid: &NetworkCid,
        record: NetworkRecord,
        _lock: ShortLock,
    ) -> Result<()> {
        self.store.write_deleting(&NetworkRecord { phase: Phase::Deleting, ..record.clone() })?;
        if let Err(used) = self.is_unused(cid, self.deadline("delete_network")) {
            self.store.write(&NetworkRecord { phase: Phase::Ready, ..record })?;
            return Err(used);
        }
        self.unmake_network(cid)
    }

    /// Whether no VM has addresses on the network.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] naming those that have, and why it can not be told.
    fn is_unused(&self, cid: &NetworkCid, deadline: Instant) -> Result<()> {
        let users =
            self.store.with_reservations(deadline, |claims| claims.vms_on_wire(&bridge(cid)))?;
        if users.is_empty() {
            return Ok(());
        }
        let users: Vec<_> = users.iter().map(|vm| format!("'{vm}'")).collect();
        Err(Error::new(
            ErrorKind::Conflict,
            format!("network '{cid}' is used by VM {}", users.join(", ")),
        ))
    }

    /// Whether the host network `name` is a managed one, which goes with delete_network.
    pub fn is_managed(&self, name: &str) -> Result<bool> {
        NetworkCid::parse(name)
            .map_or(Ok(false), |cid| Ok(self.store.read::<NetworkRecord>(&cid)?.is_some()))
    }

    /// Removes everything of a managed network, made or half made. The caller holds its lock.
    pub(super) fn unmake_network(&self, cid: &NetworkCid) -> Result<()> {
        if let Some(record) = self.store.find::<NetworkRecord>(cid)? {
            // As it was made, whatever has become of its profile.
            let pin = self.store.pins()?.into_iter().find(|pin| pin.network == cid.as_str());
            let segment = pin.map_or_else(|| self.managed_segment(&record), Ok)?;
            self.store.unpin(&segment.bridge)?;
            net::kept::let_go(&segment.bridge, &self.store.state_dir_id()?)?;
            net::apply::release(&segment)?;
        }
        self.store.remove::<NetworkRecord>(cid)
    }
}

fn config(record: &NetworkRecord) -> Result<config::Network> {
    config::Network::from_json(&Value::Object(record.settings.clone())).map_err(|e| {
        Error::new(ErrorKind::Corrupt, format!("the record of network '{}'", record.cid)).because(e)
    })
}

/// `bosh-` and what tells its cid from others.
pub(super) fn bridge(cid: &NetworkCid) -> String {
    let tail = cid.as_str().rsplit('-').next().unwrap_or_default();
    format!("bosh-{}", &tail[..tail.len().min(10)])
}

fn not_found(cid: &NetworkCid) -> Error {
    Error::new(ErrorKind::NetworkNotFound, format!("there is no network '{cid}'"))
}

/// The subnets of that length in `all`, in order.
fn subnets(all: IpNetwork, bits: u8) -> impl Iterator<Item = IpNetwork> {
    // Of IPv6 the Director names ranges.
    let (first, prefix) = match all {
        IpNetwork::V4(all) => (u32::from(all.network()), all.prefix()),
        IpNetwork::V6(_) => (0, 32),
    };
    let count = if (prefix.max(8)..=30).contains(&bits) { 1u32 << (bits - prefix) } else { 0 };
    let subnet = move |n: u32| IpAddr::V4((first + (n << (32 - u32::from(bits)))).into());
    (0..count).filter_map(move |n| IpNetwork::new(subnet(n), bits).ok())
}
