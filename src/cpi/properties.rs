//! Cloud properties. `docs/cloud-properties.md` is made from these types.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde_json::{Map, Value};

use crate::cid::{Cid, NetworkCid};
use crate::config::{AccelChoice, Config, Mtu, VlanId};
use crate::document;
use crate::error::{Error, ErrorKind, Result};
use crate::link_name::LinkName;
use crate::ranges::{AddressRange, HostPort, PortRange, Protocol};
use crate::schema::{Expected, Property, SchemaError, Whole, printable};
use crate::store::record::{Cache, Discard, Format, Preallocation};
use crate::units::MiB;

document! {
    /// Cloud properties of a VM type, a VM extension or an AZ (or of `resource_pools[]`).
    pub struct VmCloudProperties {
        /// Number of virtual CPUs.
        cpu | "cpus": Whole<1, 512> = Whole::of(1);
        /// Memory, in MiB.
        ram | "memory": MiB = MiB::new(1024).expect("in range");
        /// Size of the ephemeral disk, which holds the agent's swap and `/var/vcap/data`, in MiB.
        /// Absent: there is none, and the agent makes both on the root disk, which needs 1 GiB
        /// more.
        ephemeral_disk: Option<MiB>;
        /// Size of the root disk, in MiB. Absent, or less than the stemcell's image: the size of
        /// that.
        root_disk | "disk": Option<MiB>;
        /// Pool of the root and ephemeral disks. Absent: the state directory.
        pool: Option<String>;
        /// Machine template. Absent: the configuration's `qemu.template`.
        machine: Option<String>;
        /// CPU model as QEMU names it, with flags: `Skylake-Server,pcid=on`. Absent: the
        /// configuration's `qemu.cpu`.
        cpu_model: Option<CpuModel>;
        /// Accelerator. Absent: the configuration's `qemu.accel`.
        accel: Option<AccelChoice>;
        /// Whether the guest may run VMs itself (nested virtualization).
        nested: bool = false;
        /// Hot-plug slots beyond the configuration's `qemu.hotplug_slots`.
        extra_disks_slots: Whole<0, 128> = Whole::of(0);
        /// Security groups of the configuration: only connections that one of them admits reach the
        /// VM. Absent: every connection does.
        security_groups: Vec<String>;
        /// Ports of the host that are forwarded to the VM.
        ports: Vec<PortForward>;
        /// Addresses and subnets that the VM may send from besides its own, as `10.0.0.9` or
        /// `10.244.0.0/16`: a VRRP address that moves between VMs, the addresses of its containers.
        allowed_addresses: Vec<IpNetwork>;
        /// Whether the VM may send only from its own addresses.
        anti_spoof: bool = true;
        /// Weight of the VM when all CPUs of the host are busy, compared with other VMs. Absent:
        /// 100.
        cpu_weight: Option<Whole<1, 10000>>;
        /// Limit of read and write operations a second, for root and ephemeral disk together.
        iops: Option<Whole<1, 1000000000>>;
        /// Limit of MiB read and written a second, for root and ephemeral disk together.
        mbps: Option<Whole<1, 1000000000>>;
        /// Name of the availability zone. Accepted for the operator's use; it has no effect.
        zone: Option<String>;
    }
}

document! {
    /// Ports of the host that are forwarded to a VM.
    pub struct PortForward {
        /// Port of the host, or a range as `"8000-8010"`.
        host: PortRange;
        /// Port or range of the VM, with the same number of ports. Absent: the host's.
        guest: Option<PortRange>;
        /// Protocol, `tcp` or `udp`.
        protocol: Protocol = Protocol::Tcp;
        /// Address of the host to listen on. Absent: every address.
        address: Option<IpAddr>;
    }
}

document! {
    /// Cloud properties of a managed network.
    pub struct ManagedNetworkCloudProperties {
        /// A network profile that makes a bridge: `nat`, `routed` or `isolated`.
        profile: String = "nat".into();
        /// Whether VMs may send only from their own addresses.
        anti_spoof: bool = true;
        /// Ports of the host that VMs may connect to, as `tcp/22`.
        host_services: Vec<HostPort>;
        /// First and last address for networks of type `dynamic`.
        pool: Option<AddressRange>;
        /// MTU, in bytes.
        mtu: Option<Mtu>;
    }
}

document! {
    /// Cloud properties of a disk type (or of `disk_pools[]`).
    pub struct DiskCloudProperties {
        /// Name that the Director gives to a dynamic disk. It is stored with the disk and has no
        /// effect.
        name: Option<String>;
        /// Format of the image: `qcow2` grows as the guest writes; `raw` is faster and open to
        /// other tools.
        format | "type": Format = Format::Qcow2;
        /// Pool of the image. Absent: the state directory.
        pool: Option<String>;
        /// QEMU's cache mode: `none` bypasses the host's page cache, `writeback` uses it; with
        /// `directsync` and `writethrough` each write waits for the disk. Every mode keeps what the
        /// guest has flushed.
        cache: Cache = Cache::None;
        /// What happens to blocks that the guest discards: `unmap` returns their space to the host,
        /// `ignore` keeps it. Absent: `unmap`, but `ignore` for a disk whose space is preallocated.
        discard: Option<Discard>;
        /// What is allocated at creation: `off` nothing, `metadata` the tables (qcow2 only),
        /// `falloc` all space, reserved; `full` all space, written.
        preallocation: Preallocation = Preallocation::Off;
        /// Whether QEMU encrypts the image (LUKS) with the key of this host.
        encrypted: bool = false;
        /// Limit of read and write operations a second, together.
        iops: Option<Whole<1, 1000000000>>;
        /// Limit of MiB read and written a second, together.
        mbps: Option<Whole<1, 1000000000>>;
    }
}

impl DiskCloudProperties {
    /// Refuses combinations that no image can have, or in which one property undoes another.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`] naming the property.
    pub fn validate(&self) -> Result<()> {
        let refuse = |message: &str, hint: &str| {
            Err(Error::new(ErrorKind::BadRequest, format!("cloud_properties.{message}")).hint(hint))
        };
        if self.preallocation == Preallocation::Metadata && self.format == Format::Raw {
            return refuse(
                "preallocation: a raw image has no metadata",
                "use 'falloc' or 'full', or format 'qcow2'",
            );
        }
        if self.discard == Some(Discard::Unmap) {
            if self.preallocation.reserves_space() {
                let hint = "leave 'discard' out, or set 'preallocation: off'";
                return refuse("discard: 'unmap' would return the preallocated space", hint);
            }
            if self.encrypted && self.format == Format::Raw {
                return refuse(
                    "discard: an encrypted raw image cannot return space",
                    "use format 'qcow2'",
                );
            }
        }
        Ok(())
    }

    /// The value of `discard`: the given one, or else what the other properties allow.
    pub fn effective_discard(&self) -> Discard {
        let keeps =
            self.preallocation.reserves_space() || (self.encrypted && self.format == Format::Raw);
        self.discard.unwrap_or(if keeps { Discard::Ignore } else { Discard::Unmap })
    }
}

document! {
    /// Cloud properties of a subnet.
    pub struct SubnetCloudProperties {
        /// Network of the configuration. Absent: `default`.
        name: Option<String>;
        /// An existing bridge of the host, instead of a network of the configuration.
        bridge: Option<LinkName>;
        /// Cid of a managed network, from the answer of create_network.
        network: Option<NetworkCid>;
        /// Whether VMs may send only from their own addresses.
        anti_spoof: bool = true;
        /// VLAN id of the VM's port on a VLAN-aware bridge, or of a network with the profile `vlan`
        /// that sets none.
        vlan: Option<VlanId>;
        /// With `bridge`: the MTU of the VM's NIC, in bytes, if it is less than the bridge's.
        mtu: Option<Mtu>;
    }
}

impl Property for NetworkCid {
    const EXPECTED: Expected = Expected::text("the cid of a network");

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let cid = value.as_str().and_then(|text| Self::parse(text).ok());
        cid.ok_or_else(|| SchemaError::value(Self::EXPECTED, value))
    }
}

/// A CPU model with flags. Its characters are those of QEMU's model and flag names, so it cannot
/// begin another option.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(transparent)]
pub struct CpuModel(pub String);

impl Property for CpuModel {
    const EXPECTED: Expected = Expected::text("a CPU model: letters, digits and \"-_.,=+\"");

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.,=+".contains(c);
        match value.as_str() {
            Some(text)
                if text.starts_with(|c: char| c.is_ascii_alphanumeric())
                    && text.chars().all(allowed) =>
            {
                Ok(Self(text.to_owned()))
            }
            _ => Err(SchemaError::value(Self::EXPECTED, value)),
        }
    }
}

/// Reads `given` over `defaults`: a shallow merge, as the Director's. A given property replaces a
/// default of another spelling.
///
/// # Errors
/// `BadRequest` naming the property.
pub fn read<T: Property>(defaults: &Map<String, Value>, given: &Map<String, Value>) -> Result<T> {
    let keys = T::keys();
    let names = |spelling: &str| {
        keys.iter().find(|k| k.name == spelling || k.aliases.contains(&spelling)).map(|k| k.name)
    };
    let mut merged = given.clone();
    for (key, value) in defaults {
        let name = names(key).unwrap_or(key);
        if !given.keys().any(|k| names(k).unwrap_or(k) == name) {
            merged.insert(key.clone(), value.clone());
        }
    }
    T::from_json(&Value::Object(merged)).map_err(|e| e.in_request("cloud_properties"))
}

/// Checks the defaults of cloud properties in a configuration.
///
/// # Errors
/// Names the property below `vm_defaults` or `disk_defaults`.
pub fn check_defaults(config: &Config) -> Result<(), SchemaError> {
    VmCloudProperties::from_json(&Value::Object(config.vm_defaults.clone()))
        .map_err(|error| error.under("vm_defaults"))?;
    DiskCloudProperties::from_json(&Value::Object(config.disk_defaults.clone()))
        .map_err(|error| error.under("disk_defaults"))?;
    Ok(())
}

/// Ensures that the host has the pool that a cloud property names.
pub(super) fn ensure_pool_exists(config: &Config, asked: Option<&str>) -> Result<()> {
    let Some(asked) = asked else { return Ok(()) };
    if config.pools.contains_key(asked) {
        return Ok(());
    }
    let known: Vec<_> = config.pools.keys().map(String::as_str).collect();
    let hint = match known.as_slice() {
        [] => "'pools' in the configuration is empty: add the pool, or remove 'pool'".to_owned(),
        known => format!("the configuration has: {}", known.join(", ")),
    };
    let message = format!("cloud_properties.pool: this host has no pool '{}'", printable(asked));
    Err(Error::new(ErrorKind::BadRequest, message).hint(hint))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn vm(defaults: &Value, given: &Value) -> Result<VmCloudProperties> {
        read(defaults.as_object().unwrap(), given.as_object().unwrap())
    }

    #[test]
    fn a_request_wins_over_defaults_in_any_spelling() {
        let properties = vm(&json!({"memory": 512, "cpu": 3}), &json!({"ram": 2048})).unwrap();
        assert_eq!((properties.ram.get(), properties.cpu.get()), (2048, 3));
    }

    #[test]
    fn combinations_that_can_not_be_are_refused_by_name() {
        let refusal = |given: Value| {
            let disk: DiskCloudProperties = read(&Map::new(), given.as_object().unwrap()).unwrap();
            disk.validate().map_err(|e| e.report())
        };
        for (given, property) in [
            (json!({"format": "raw", "preallocation": "metadata"}), "preallocation"),
            (json!({"preallocation": "full", "discard": "unmap"}), "discard"),
            (json!({"preallocation": "falloc", "discard": "unmap"}), "discard"),
            (json!({"format": "raw", "encrypted": true, "discard": "unmap"}), "discard"),
        ] {
            let refused = refusal(given).unwrap_err();
            assert!(refused.starts_with(&format!("cloud_properties.{property}: ")), "{refused}");
        }
        assert_eq!(
            refusal(json!({"preallocation": "full", "discard": "ignore", "encrypted": true})),
            Ok(())
        );
    }

    #[test]
    fn discard_is_what_the_other_properties_allow() {
        let discard = |given: Value| {
            let disk: DiskCloudProperties = read(&Map::new(), given.as_object().unwrap()).unwrap();
            disk.effective_discard()
        };
        assert_eq!(discard(json!({})), Discard::Unmap);
        assert_eq!(
            discard(json!({"preallocation": "metadata", "encrypted": true})),
            Discard::Unmap
        );
        assert_eq!(discard(json!({"preallocation": "falloc"})), Discard::Ignore);
        assert_eq!(discard(json!({"format": "raw", "encrypted": true})), Discard::Ignore);
    }

    #[test]
    fn mistakes_are_named_with_what_was_meant() {
        let refusal = |given| vm(&json!({}), &given).unwrap_err().report();
        assert_eq!(
            refusal(json!({"rma": 1})),
            "cloud_properties.rma: unknown key; did you mean 'ram'?"
        );
        assert_eq!(
            refusal(json!({"ram": -1})),
            "cloud_properties.ram: expected a whole number of MiB from 1 to 67108864, got -1"
        );
        assert!(refusal(json!({"cpu_model": "host;rm"})).contains("a CPU model"));
        assert!(refusal(json!({"ephemeral_disk": 1.5})).contains("ephemeral_disk"));
    }
}
