//! From the networks of create_vm to NICs: the host network that each is on, what it may send,
//! where its address comes from.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::cid::{NetworkCid, VmCid};
use crate::config::{self, GroupRule};
use crate::cpi::context::Context;
use crate::cpi::contract::networks::{Addressing, NetworkSpec, Networks};
use crate::cpi::network::managed;
use crate::cpi::properties::{SubnetCloudProperties, VmCloudProperties};
use crate::error::{Error, ErrorKind, Result};
use crate::mac::mac_address;
use crate::net::plan::{NicPlan, Requested};
use crate::net::{self, profile::Profile};
use crate::qemu::topology::MAX_NICS;
use crate::ranges::AddressRange;
use crate::schema::{Property, printable};
use crate::store::nic_rules::{Admission, NicRules};
use crate::store::record::{Keeper, Nic, Segment, Wire};
use crate::store::reservations::Reservation;

/// The range that a dynamic network's addresses come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::cpi) struct AddressPool {
    /// The first and the last address.
    pub range: AddressRange,
    /// The subnet they lie in.
    pub subnet: IpNetwork,
    /// The subnet's router.
    pub gateway: Option<IpAddr>,
    /// The address that the instance had before; preferred if it is free.
    pub previous: Option<IpAddr>,
}

/// A NIC of a new VM, before its addresses are reserved.
#[derive(Debug)]
pub(in crate::cpi) struct PlannedNic {
    /// Its position in the manifest.
    pub index: usize,
    /// The NIC as the record will have it.
    pub nic: Nic,
    /// Where the address of a dynamic network comes from.
    pub pool: Option<AddressPool>,
    /// The managed network that it is on.
    pub managed: Option<NetworkCid>,
}

/// The host network of one NIC.
struct Chosen {
    place: NicPlan,
    pool: Option<AddressPool>,
    anti_spoof: bool,
    offload: bool,
    probe: Option<bool>,
}

/// The NICs of `vm` in the order of the manifest. Networks of type `vip` get none.
pub(in crate::cpi) fn plan(
    cx: &Context,
    vm: &VmCid,
    networks: &Networks,
    properties: &VmCloudProperties,
) -> Result<Vec<PlannedNic>> {
    let is_vip = |network: &NetworkSpec| matches!(network.addressing, Addressing::Vip { .. });
    let wired: Vec<_> = networks.iter().filter(|network| !is_vip(network)).collect();
    for (index, network) in wired.iter().enumerate() {
        let shared = wired[..index]
            .iter()
            .find(|n| n.nic_group.is_some() && n.nic_group == network.nic_group);
        if let Some(other) = shared {
            // The agent writes one file per NIC, so the second network would replace the first.
            return Err(Error::new(
                ErrorKind::NotSupported,
                format!("networks '{}' and '{}' share a nic_group", other.name, network.name),
            )
            .hint(
                "give each network its own NIC: the agent cannot configure two networks on one",
            ));
        }
    }
    if wired.len() > MAX_NICS {
        let count = wired.len();
        return Err(Error::new(
            ErrorKind::NotSupported,
            format!("the VM has {count} networks, at most {MAX_NICS} are supported"),
        ));
    }
    let admits = group_admissions(cx, &properties.security_groups)?;
    let nic = |(index, network)| plan_nic(cx, vm, index, network, properties, admits.as_deref());
    let planned: Vec<_> = wired.into_iter().enumerate().map(nic).collect::<Result<_>>()?;
    ensure_distinct_addresses(&planned)?;
    Ok(planned)
}

fn plan_nic(
    cx: &Context,
    vm: &VmCid,
    index: usize,
    network: &NetworkSpec,
    properties: &VmCloudProperties,
    admits: Option<&[Admission]>,
) -> Result<PlannedNic> {
    let path = format!("networks.{}.cloud_properties", network.name);
    let given = serde_json::Value::Object(network.cloud_properties.0.clone());
    let subnet = SubnetCloudProperties::from_json(&given).map_err(|e| e.in_request(&path))?;
    let chosen = choose(cx, &subnet, network, &path)
        .map_err(|e| e.during(format!("network '{}'", network.name)))?;
    let mut rules = NicRules {
        anti_spoof: chosen.anti_spoof && subnet.anti_spoof && properties.anti_spoof,
        offload: chosen.offload,
        addresses: own_block(network).into_iter().collect(),
        allowed: properties.allowed_addresses.clone(),
        ..NicRules::default()
    };
    if rules.anti_spoof {
        ensure_gateways_not_allowed(network, &chosen.place, &rules.allowed)?;
    }
    let wire = match chosen.place {
        NicPlan::User(user) => Wire::User { user },
        NicPlan::Bridge(segment) => {
            rules.admits = admits.map(<[_]>::to_vec);
            rules.probe = chosen.probe.unwrap_or_else(|| has_other_machines(&segment));
            Wire::Tap { tap: net::tap::tap_name(vm, index), segment }
        }
    };
    let nic = Nic {
        network: network.name.clone(),
        mac: mac_address(vm, index),
        wire,
        rules: Some(rules),
    };
    Ok(PlannedNic { index, nic, pool: chosen.pool, managed: subnet.network })
}

/// The host network for `network`, whose cloud properties are `subnet`, at `path` in the request.
fn choose(
    cx: &Context,
    subnet: &SubnetCloudProperties,
    network: &NetworkSpec,
    path: &str,
) -> Result<Chosen> {
    let bad = |problem: &str| Err(Error::new(ErrorKind::BadRequest, format!("{path}{problem}")));
    let vlan = subnet.vlan.map(|vlan| u16::try_from(vlan.get()).expect("at most 4094"));
    match (&subnet.bridge, &subnet.name, &subnet.network) {
        (Some(_), Some(_), _) => bad(": give 'name' or 'bridge', not both"),
        (Some(_), _, Some(_)) | (_, Some(_), Some(_)) => {
            bad(": give 'network' without 'name' and 'bridge'")
        }
        // The bridge must exist: a request cannot make interfaces.
        (Some(bridge), ..) => {
            let segment =
                net::plan::existing_bridge(bridge, vlan, subnet.mtu.map(net::plan::mtu_bytes));
            Ok(Chosen {
                place: NicPlan::Bridge(segment),
                pool: None,
                anti_spoof: true,
                offload: false,
                probe: None,
            })
        }
        _ if subnet.mtu.is_some() => {
            bad(".mtu: only with 'bridge'; the networks of this host have an MTU of their own")
        }
        (.., Some(cid)) => {
            on_host_network(cx, cid.to_string().as_str(), &managed::find(cx, cid)?, network, vlan)
        }
        (_, name, None) => {
            let name = name.as_deref().unwrap_or("default");
            on_host_network(cx, name, configured(cx, name, path)?, network, vlan)
        }
    }
}

/// The place of `network` on the host network `name`.
fn on_host_network(
    cx: &Context,
    name: &str,
    host: &config::Network,
    network: &NetworkSpec,
    vlan: Option<u16>,
) -> Result<Chosen> {
    let profile = Profile::load(&host.profile, cx.config.network_profiles_dir.as_deref())
        .map_err(|e| e.during(format!("host network '{name}'")))?;
    let place =
        net::plan::plan_nic(name, host, &profile, &Requested { vlan, ..requested(network) })?;
    if let (NicPlan::Bridge(segment), None) = (&place, host.subnet) {
        net::subnet_conflict::ensure_free(segment).map_err(|e| {
            e.hint(format!("choose another subnet in the manifest, or set networks.{name}.subnet"))
        })?;
    }
    let pool = match network.addressing {
        Addressing::Dynamic { previous } => {
            pool(name, host, &place)?.map(|pool| AddressPool { previous, ..pool })
        }
        _ => None,
    };
    Ok(Chosen {
        place,
        pool,
        anti_spoof: host.anti_spoof,
        offload: host.offload,
        probe: host.conflict_probe,
    })
}

fn configured<'a>(cx: &'a Context, name: &str, path: &str) -> Result<&'a config::Network> {
    cx.config.networks.get(name).ok_or_else(|| {
        let known: Vec<_> = cx.config.networks.keys().map(String::as_str).collect();
        let message = format!("{path}.name: this host has no network '{}'", printable(name));
        Error::new(ErrorKind::BadRequest, message)
            .hint(format!("the configuration has: {}", known.join(", ")))
    })
}

/// What the security groups admit together; `None` without groups.
fn group_admissions(cx: &Context, groups: &[String]) -> Result<Option<Vec<Admission>>> {
    let rules = |(index, name): (usize, &String)| {
        cx.config.security_groups.get(name).ok_or_else(|| {
            let known: Vec<_> = cx.config.security_groups.keys().map(String::as_str).collect();
            let name = printable(name);
            let message = format!(
                "cloud_properties.security_groups.{index}: this host has no security group '{name}'"
            );
            let hint = match known.as_slice() {
                [] => "add the group to 'security_groups' in the configuration".to_owned(),
                known => format!("the configuration has: {}", known.join(", ")),
            };
            Error::new(ErrorKind::BadRequest, message).hint(hint)
        })
    };
    let rules: Vec<_> = groups.iter().enumerate().map(rules).collect::<Result<_>>()?;
    Ok((!groups.is_empty()).then(|| rules.into_iter().flatten().flat_map(admissions).collect()))
}

/// What a rule admits. A rule without a source admits all of IPv4 and IPv6.
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

/// Refuses allowed addresses that include the gateway: a VM that sends as its gateway receives what
/// its neighbours send.
fn ensure_gateways_not_allowed(
    network: &NetworkSpec,
    place: &NicPlan,
    allowed: &[IpNetwork],
) -> Result<()> {
    let mut gateways: Vec<_> = match place {
        NicPlan::Bridge(Segment { keeper: Keeper::Cpi { addresses, .. }, .. }) => {
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
        "cloud_properties.allowed_addresses: {block} contains the gateway of network '{}'",
        network.name
    );
    Err(Error::new(ErrorKind::BadRequest, problem)
        .hint("allow only addresses of the VM; `anti_spoof: false` lets it send from any address"))
}

/// Refuses one address on two NICs of a VM: on one wire each would answer for the other, and with
/// two user networks the guest has two routes to the same addresses.
fn ensure_distinct_addresses(planned: &[PlannedNic]) -> Result<()> {
    let reservations = |planned: &PlannedNic| -> Vec<Reservation> {
        let rules = planned.nic.rules.iter().flat_map(|rules| &rules.addresses);
        match &planned.nic.wire {
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
    for (at, one) in planned.iter().enumerate() {
        let meets = |other: &&PlannedNic| {
            reservations(one)
                .iter()
                .any(|own| reservations(other).iter().any(|its| its.overlaps(own)))
        };
        if let Some(other) = planned[..at].iter().find(meets) {
            let problem = format!(
                "networks '{}' and '{}' have the same ip",
                other.nic.network, one.nic.network
            );
            return Err(Error::new(ErrorKind::BadRequest, problem));
        }
    }
    Ok(())
}

/// Whether machines other than VMs of this host can be on the wire.
fn has_other_machines(segment: &Segment) -> bool {
    match &segment.keeper {
        Keeper::Operator => true,
        Keeper::Cpi { uplink, .. } => uplink.is_some(),
    }
}

/// The block of addresses that the Director gives to the VM.
fn own_block(network: &NetworkSpec) -> Option<IpNetwork> {
    let Addressing::Manual { address, prefix, .. } = network.addressing else { return None };
    let one = IpNetwork::from(address.ip());
    let block = prefix
        .and_then(|prefix| IpNetwork::new(address.ip(), prefix.min(one.prefix())).ok())
        .unwrap_or(one);
    IpNetwork::new(block.network(), block.prefix()).ok()
}

/// Where the addresses of a dynamic network come from; `None` for a DHCP server on the wire, or
/// QEMU's user network.
fn pool(name: &str, host: &config::Network, place: &NicPlan) -> Result<Option<AddressPool>> {
    let own = match place {
        NicPlan::User(_) => return Ok(None),
        NicPlan::Bridge(Segment { keeper: Keeper::Cpi { addresses, .. }, .. }) => {
            addresses.first().copied()
        }
        NicPlan::Bridge(_) => None,
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
    let range = net::plan::dynamic_pool(name, host, subnet)?;
    let gateway = own.map(|address| address.ip()).or(host.gateway);
    Ok(Some(AddressPool { range, subnet, gateway, previous: None }))
}

/// The addresses that the request gives for a network.
fn requested(network: &NetworkSpec) -> Requested {
    match &network.addressing {
        Addressing::Manual { address, gateway, .. } => {
            let (ip, netmask) = (Some(address.ip()), Some(address.mask()));
            Requested { ip, netmask, gateway: *gateway, ..Default::default() }
        }
        // The previous address may be of another subnet.
        Addressing::Dynamic { .. } => Requested::default(),
        Addressing::Vip { ip } => Requested { ip: Some(*ip), ..Default::default() },
    }
}
