//! From create_vm's networks to network cards: which host network each is on, what it may send, what the agent is told.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::Cpi;
use super::cloud_properties::{SubnetCloudProperties, VmCloudProperties};
use super::networks::{Addressing, NetworkSpec, Networks};
use crate::cid::{NetworkCid, VmCid};
use crate::config::{self, GroupRule};
use crate::error::{Error, ErrorKind, Result};
use crate::mac::mac_address;
use crate::net::plan::{Place, Requested};
use crate::net::{self, profile::Profile};
use crate::qemu::topology::MAX_NICS;
use crate::ranges::AddressRange;
use crate::schema::Property;
use crate::store::nic_rules::{Admission, NicRules};
use crate::store::record::{Keeper, Nic, Segment, Wire};
use crate::store::reservations::Reservation;

/// Where a dynamic network's addresses come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pool {
    /// First and last.
    pub range: AddressRange,
    /// The subnet they lie in.
    pub subnet: IpNetwork,
    /// The subnet's router.
    pub gateway: Option<IpAddr>,
    /// What the instance had before: a wish.
    pub previous: Option<IpAddr>,
}

/// A card, and where its address comes from if that is not known yet.
#[derive(Debug)]
pub(super) struct Placed {
    /// Its place in the manifest.
    pub index: usize,
    pub nic: Nic,
    pub pool: Option<Pool>,
    /// The managed network it is on.
    pub managed: Option<NetworkCid>,
}

/// A host network as it is to be used by one card.
struct Chosen {
    place: Place,
    pool: Option<Pool>,
    anti_spoof: bool,
    probe: Option<bool>,
}

impl Cpi {
    /// The cards of `vm` in manifest order. Networks of type `vip` have none: nothing is configured for them.
    pub(super) fn nics(
        &self,
        vm: &VmCid,
        networks: &Networks,
        properties: &VmCloudProperties,
    ) -> Result<Vec<Placed>> {
        let is_vip = |network: &NetworkSpec| matches!(network.addressing, Addressing::Vip { .. });
        let wired: Vec<_> = networks.iter().filter(|network| !is_vip(network)).collect();
        for (index, network) in wired.iter().enumerate() {
            let shared = wired[..index]
                .iter()
                .find(|n| n.nic_group.is_some() && n.nic_group == network.nic_group);
            if let Some(other) = shared {
                // The agent writes one file per NIC and network, and the second would replace the first.
                return Err(Error::new(
                    ErrorKind::NotSupported,
                    format!("networks '{}' and '{}' share a nic_group", other.name, network.name),
                )
                .hint("give each network a NIC of its own: the agent can not configure two static networks on one"));
            }
        }
        if wired.len() > MAX_NICS {
            let count = wired.len();
            return Err(Error::new(
                ErrorKind::NotSupported,
                format!("{count} networks; a VM can have {MAX_NICS}"),
            ));
        }
        let admits = self.admissions(&properties.security_groups)?;
        let nic = |(index, network)| self.nic(vm, index, network, properties, admits.as_deref());
        let placed: Vec<_> = wired.into_iter().enumerate().map(nic).collect::<Result<_>>()?;
        check_apart(&placed)?;
        Ok(placed)
    }

    fn nic(
        &self,
        vm: &VmCid,
        index: usize,
        network: &NetworkSpec,
        properties: &VmCloudProperties,
        admits: Option<&[Admission]>,
    ) -> Result<Placed> {
        let path = format!("networks.{}.cloud_properties", network.name);
        let given = serde_json::Value::Object(network.cloud_properties.0.clone());
        let subnet = SubnetCloudProperties::from_json(&given).map_err(|e| e.in_request(&path))?;
        let chosen = self
            .choose(&subnet, network, &path)
            .map_err(|e| e.during(format!("network '{}'", network.name)))?;
        let mut rules = NicRules {
            anti_spoof: chosen.anti_spoof && subnet.anti_spoof && properties.anti_spoof,
            addresses: own_block(network).into_iter().collect(),
            allowed: properties.allowed_addresses.clone(),
            ..NicRules::default()
        };
        if rules.anti_spoof {
            check_allowed(network, &chosen.place, &rules.allowed)?;
        }
        let wire = match chosen.place {
            Place::User(user) => Wire::User { user },
            Place::Bridge(segment) => {
                rules.admits = admits.map(<[_]>::to_vec);
                rules.probe = chosen.probe.unwrap_or_else(|| has_strangers(&segment));
                Wire::Tap { tap: net::tap::tap_name(vm, index), segment }
            }
        };
        let nic = Nic {
            network: network.name.clone(),
            mac: mac_address(vm, index),
            wire,
            rules: Some(rules),
        };
        Ok(Placed { index, nic, pool: chosen.pool, managed: subnet.network })
    }

    /// Where the NIC of a network is, whose cloud properties `subnet` are at `path`.
    fn choose(
        &self,
        subnet: &SubnetCloudProperties,
        network: &NetworkSpec,
        path: &str,
    ) -> Result<Chosen> {
        let bad =
            |problem: &str| Err(Error::new(ErrorKind::BadRequest, format!("{path}{problem}")));
        let vlan = subnet.vlan.map(|vlan| u16::try_from(vlan.get()).expect("at most 4094"));
        match (&subnet.bridge, &subnet.name, &subnet.network) {
            (Some(_), Some(_), _) => bad(": give 'name' or 'bridge', not both"),
            (Some(_), _, Some(_)) | (_, Some(_), Some(_)) => bad(": 'network' stands alone"),
            // A bridge named by a manifest must exist: a request does not make interfaces of its choosing.
            (Some(bridge), ..) => {
                let segment =
                    net::plan::existing_bridge(bridge, vlan, subnet.mtu.map(net::plan::bytes));
                Ok(Chosen {
                    place: Place::Bridge(segment),
                    pool: None,
                    anti_spoof: true,
                    probe: None,
                })
            }
            _ if subnet.mtu.is_some() => {
                bad(".mtu: only with 'bridge'; networks of this host have their own")
            }
            (.., Some(cid)) => {
                self.on(cid.to_string().as_str(), &self.managed(cid)?, network, vlan)
            }
            (_, name, None) => {
                let name = name.as_deref().unwrap_or("default");
                self.on(name, self.configured(name, path)?, network, vlan)
            }
        }
    }

    /// The NIC of a network is on the host network `name`.
    fn on(
        &self,
        name: &str,
        host: &config::Network,
        network: &NetworkSpec,
        vlan: Option<u16>,
    ) -> Result<Chosen> {
        let profile = Profile::load(&host.profile, self.config.network_profiles_dir.as_deref())
            .map_err(|e| e.during(format!("host network '{name}'")))?;
        let place =
            net::plan::place(name, host, &profile, &Requested { vlan, ..requested(network) })?;
        if let (Place::Bridge(segment), None) = (&place, host.subnet) {
            net::taken::refuse(segment).map_err(|e| {
                e.hint(format!(
                    "choose another subnet in the manifest, or have VMs keep this one: networks.{name}.subnet"
                ))
            })?;
        }
        let pool = match network.addressing {
            Addressing::Dynamic { previous } => {
                pool(name, host, &place)?.map(|pool| Pool { previous, ..pool })
            }
            _ => None,
        };
        Ok(Chosen { place, pool, anti_spoof: host.anti_spoof, probe: host.conflict_probe })
    }

    fn configured(&self, name: &str, path: &str) -> Result<&config::Network> {
        self.config.networks.get(name).ok_or_else(|| {
            let known: Vec<_> = self.config.networks.keys().map(String::as_str).collect();
            Error::new(
                ErrorKind::BadRequest,
                format!("{path}.name: this host has no network of that name"),
            )
            .hint(format!("the configuration has: {}", known.join(", ")))
        })
    }

    /// What the groups admit together; `None` without groups.
    fn admissions(&self, groups: &[String]) -> Result<Option<Vec<Admission>>> {
        let rules = |(index, name): (usize, &String)| {
            self.config.security_groups.get(name).ok_or_else(|| {
                let known: Vec<_> =
                    self.config.security_groups.keys().map(String::as_str).collect();
                let problem = format!(
                    "cloud_properties.security_groups.{index}: this host has no such group"
                );
                Error::new(ErrorKind::BadRequest, problem)
                    .hint(format!("the configuration has: {}", known.join(", ")))
            })
        };
        let rules: Vec<_> = groups.iter().enumerate().map(rules).collect::<Result<_>>()?;
        Ok((!groups.is_empty()).then(|| rules.into_iter().flatten().flat_map(admissions).collect()))
    }
}

/// What a rule admits: from everywhere means from all of IPv4 and of IPv6.
fn admissions(rule: &GroupRule) -> Vec<Admission> {
    let everywhere = || ["0.0.0.0/0", "::/0"].map(|text| text.parse().expect("a subnet")).to_vec();
    let ports = rule.ports.map_or((0, u16::MAX), |ports| (ports.first, ports.last));
    let admission = |source: IpNetwork| Admission {
        source,
        protocols: rule.protocol.numbers(source.is_ipv6()),
        ports: rule.protocol.has_ports().then_some(ports),
    };
    rule.source.map_or_else(everywhere, |source| vec![source]).into_iter().map(admission).collect()
}

/// A VM that may send as its gateway could have all that its neighbours send.
fn check_allowed(network: &NetworkSpec, place: &Place, allowed: &[IpNetwork]) -> Result<()> {
    let mut gateways: Vec<_> = match place {
        Place::Bridge(Segment { keeper: Keeper::Cpi { addresses, .. }, .. }) => {
            addresses.iter().map(IpNetwork::ip).collect()
        }
        _ => Vec::new(),
    };
    if let Addressing::Manual { gateway, .. } = network.addressing {
        gateways.extend(gateway);
    }
    let too_wide = |block: &&IpNetwork| {
        block.prefix() == 0 || gateways.iter().any(|gateway| block.contains(*gateway))
    };
    let Some(block) = allowed.iter().find(too_wide) else { return Ok(()) };
    let problem = format!(
        "cloud_properties.allowed_addresses: {block} has the gateway of network '{}'",
        network.name
    );
    Err(Error::new(ErrorKind::BadRequest, problem)
        .hint("allow what is the VM's alone; anti_spoof: false lets it send as anybody"))
}

/// Two cards of one VM can not have one address: on one wire they would answer for each other, and on two of QEMU's own the
/// guest would not know by which to leave.
fn check_apart(placed: &[Placed]) -> Result<()> {
    let claims = |placed: &Placed| -> Vec<Reservation> {
        let rules = placed.nic.rules.iter().flat_map(|rules| &rules.addresses);
        match &placed.nic.wire {
            Wire::Tap { segment, .. } => {
                rules.map(|block| Reservation::block(segment, *block)).collect()
            }
            Wire::User { user } => {
                vec![Reservation::Addresses {
                    wire: "user".to_owned(),
                    block: IpAddr::from(user.guest).into(),
                }]
            }
        }
    };
    for (at, one) in placed.iter().enumerate() {
        let meets = |other: &&Placed| {
            claims(one).iter().any(|own| claims(other).iter().any(|its| its.overlaps(own)))
        };
        if let Some(other) = placed[..at].iter().find(meets) {
            let problem = format!(
                "networks '{}' and '{}' have the same ip",
                other.nic.network, one.nic.network
            );
            return Err(Error::new(ErrorKind::BadRequest, problem));
        }
    }
    Ok(())
}

/// Whether other machines than VMs of this host can be on the wire.
fn has_strangers(segment: &Segment) -> bool {
    match &segment.keeper {
        Keeper::Operator => true,
        Keeper::Cpi { uplink, .. } => uplink.is_some(),
    }
}

/// The block of addresses that is the VM's own, as the Director says.
fn own_block(network: &NetworkSpec) -> Option<IpNetwork> {
    let Addressing::Manual { address, prefix, .. } = network.addressing else { return None };
    let one = IpNetwork::from(address.ip());
    let block = prefix
        .and_then(|prefix| IpNetwork::new(address.ip(), prefix.min(one.prefix())).ok())
        .unwrap_or(one);
    IpNetwork::new(block.network(), block.prefix()).ok()
}

/// Where addresses of a dynamic network come from: `None` if somebody else's DHCP server gives them, or the place has one
/// already.
fn pool(name: &str, host: &config::Network, place: &Place) -> Result<Option<Pool>> {
    let own = match place {
        Place::User(_) => return Ok(None),
        Place::Bridge(Segment { keeper: Keeper::Cpi { addresses, .. }, .. }) => {
            addresses.first().copied()
        }
        Place::Bridge(_) => None,
    };
    let Some(subnet) = host.subnet.or(own) else {
        return match host.pool {
            None => Ok(None),
            Some(_) => {
                let problem = format!("host network '{name}' has a pool and no subnet");
                Err(Error::new(ErrorKind::BadConfig, problem)
                    .hint(format!("set networks.{name}.subnet")))
            }
        };
    };
    let range = net::plan::pool(name, host, subnet)?;
    let gateway = own.map(|address| address.ip()).or(host.gateway);
    Ok(Some(Pool { range, subnet, gateway, previous: None }))
}

/// The addresses a network brings, as the host's side needs them.
fn requested(network: &NetworkSpec) -> Requested {
    match &network.addressing {
        Addressing::Manual { address, gateway, .. } => {
            let (ip, netmask) = (Some(address.ip()), Some(address.mask()));
            Requested { ip, netmask, gateway: *gateway, ..Default::default() }
        }
        // What it had before is a wish, which may be of another subnet.
        Addressing::Dynamic { .. } => Requested::default(),
        Addressing::Vip { ip } => Requested { ip: Some(*ip), ..Default::default() },
    }
}
