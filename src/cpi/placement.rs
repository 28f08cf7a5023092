//! From create_vm's networks to network cards: which host network each is on, what the agent is told.

use super::Cpi;
use super::cloud_properties::SubnetCloudProperties;
use super::networks::{Addressing, NetworkSpec, Networks};
use crate::cid::VmCid;
use crate::config;
use crate::error::{Error, ErrorKind, Result};
use crate::mac::mac_address;
use crate::net::plan::{Place, Requested};
use crate::net::{self, profile::Profile};
use crate::qemu::topology::MAX_NICS;
use crate::schema::Property;
use crate::store::record::{Keeper, Nic, Wire};

impl Cpi {
    /// The NICs of `vm` in manifest order. Networks of type `vip` have none: nothing is configured for them.
    pub(super) fn nics(&self, vm: &VmCid, networks: &Networks) -> Result<Vec<Nic>> {
        let is_vip = |network: &NetworkSpec| matches!(network.addressing, Addressing::Vip { .. });
        let wired: Vec<_> = networks.iter().filter(|network| !is_vip(network)).collect();
        for (index, network) in wired.iter().enumerate() {
            let shared = wired[..index].iter().find(|n| n.nic_group.is_some() && n.nic_group == network.nic_group);
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
            return Err(Error::new(ErrorKind::NotSupported, format!("{count} networks; a VM can have {MAX_NICS}")));
        }
        wired.into_iter().enumerate().map(|(index, network)| self.nic(vm, index, network)).collect()
    }

    fn nic(&self, vm: &VmCid, index: usize, network: &NetworkSpec) -> Result<Nic> {
        let path = format!("networks.{}.cloud_properties", network.name);
        let properties = serde_json::Value::Object(network.cloud_properties.0.clone());
        let subnet = SubnetCloudProperties::from_json(&properties).map_err(|e| e.in_request(&path))?;
        let dynamic = matches!(network.addressing, Addressing::Dynamic { .. });
        let place = self.place(&subnet, network, &path).map_err(|e| e.during(format!("network '{}'", network.name)))?;
        let wire = match place {
            Place::User(user) => Wire::User { user },
            Place::Bridge(segment) if dynamic && matches!(segment.keeper, Keeper::Us { .. }) => {
                let message = format!(
                    "network '{}' is dynamic, and host network '{}' has no DHCP server",
                    network.name, segment.network
                );
                return Err(Error::new(ErrorKind::NotSupported, message)
                    .hint("use a manual network, or an operator's bridge on which something serves DHCP"));
            }
            Place::Bridge(segment) => Wire::Tap { tap: net::tap::tap_name(vm, index), segment },
        };
        Ok(Nic { network: network.name.clone(), mac: mac_address(vm, index), wire, rules: None })
    }

    /// Where the NIC of a network is, whose cloud properties `subnet` are at `path`.
    fn place(&self, subnet: &SubnetCloudProperties, network: &NetworkSpec, path: &str) -> Result<Place> {
        let bad = |problem: &str| Err(Error::new(ErrorKind::BadRequest, format!("{path}{problem}")));
        let vlan = subnet.vlan.map(|vlan| u16::try_from(vlan.get()).expect("at most 4094"));
        match (&subnet.bridge, &subnet.name) {
            (Some(_), Some(_)) => bad(": give 'name' or 'bridge', not both"),
            // A bridge named by a manifest must exist: a request does not make interfaces of its choosing.
            (Some(bridge), None) => {
                Ok(Place::Bridge(net::plan::existing_bridge(bridge, vlan, subnet.mtu.map(net::plan::bytes))))
            }
            (None, _) if subnet.mtu.is_some() => bad(".mtu: only with 'bridge'; networks of this host have their own"),
            (None, name) => {
                let name = name.as_deref().unwrap_or("default");
                let host = self.configured(name, path)?;
                let profile = Profile::load(&host.profile, self.config.network_profiles_dir.as_deref())
                    .map_err(|e| e.during(format!("host network '{name}'")))?;
                net::plan::place(name, host, &profile, &Requested { vlan, ..requested(network) })
            }
        }
    }

    fn configured(&self, name: &str, path: &str) -> Result<&config::Network> {
        self.config.networks.get(name).ok_or_else(|| {
            let known: Vec<_> = self.config.networks.keys().map(String::as_str).collect();
            Error::new(ErrorKind::BadRequest, format!("{path}.name: this host has no network of that name"))
                .hint(format!("the configuration has: {}", known.join(", ")))
        })
    }
}

/// The addresses a network brings, as the host's side needs them.
fn requested(network: &NetworkSpec) -> Requested {
    match &network.addressing {
        Addressing::Manual { address, gateway, .. } => {
            let (ip, netmask) = (Some(address.ip()), Some(address.mask()));
            Requested { ip, netmask, gateway: *gateway, ..Default::default() }
        }
        Addressing::Dynamic { previous: ip } => Requested { ip: *ip, ..Default::default() },
        Addressing::Vip { ip } => Requested { ip: Some(*ip), ..Default::default() },
    }
}
