//! Cloud properties: what a manifest may ask of us. `docs/cloud-properties.md` is made from these types.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde_json::{Map, Value};

use super::Cpi;
use crate::cid::{Cid, NetworkCid};
use crate::config::{AccelChoice, Mtu, VlanId};
use crate::document;
use crate::error::{Error, ErrorKind, Result};
use crate::link_name::LinkName;
use crate::ranges::{AddressRange, HostPort, PortRange, Protocol};
use crate::schema::{Property, SchemaError, Whole};
use crate::store::record::{Cache, Discard, Format, Preallocation};
use crate::units::MiB;

document! {
    /// What a VM type (or `resource_pools[].cloud_properties`) may ask for.
    pub struct VmCloudProperties {
        /// Virtual CPUs.
        cpu | "cpus": Whole<1, 512> = Whole::of(1);
        /// Memory, MiB.
        ram | "memory": MiB = MiB::new(1024).expect("in range");
        /// A disk of its own for the agent's swap and `/var/vcap/data`, MiB. Absent: the agent makes both behind the
        /// root filesystem, which then needs 1 GiB to spare.
        ephemeral_disk: Option<MiB>;
        /// Size of the root disk, MiB, if the stemcell's is smaller.
        root_disk | "disk": Option<MiB>;
        /// Pool of the root and ephemeral disks. Absent: the state directory.
        pool: Option<String>;
        /// Machine template. Absent: the configuration's `qemu.template`.
        machine: Option<String>;
        /// CPU model as QEMU names it, with flags: `Skylake-Server,pcid=on`. Absent: the configuration's `qemu.cpu`.
        cpu_model: Option<CpuModel>;
        /// Accelerator. Absent: the configuration's `qemu.accel`.
        accel: Option<AccelChoice>;
        /// Whether the guest may run VMs of its own.
        nested: bool = false;
        /// Hot-plug slots beyond the configuration's `qemu.hotplug_slots`.
        extra_disks_slots: Whole<0, 128> = Whole::of(0);
        /// Security groups of the configuration: only what one of them admits may begin to speak to the VM. Absent:
        /// everybody may.
        security_groups: Vec<String>;
        /// Ports of the host that lead to the VM.
        ports: Vec<PortForward>;
        /// Addresses and subnets it may send from beside its own, `10.0.0.9` or `10.244.0.0/16`: those that wander between
        /// VMs (VRRP), those of its containers.
        allowed_addresses: Vec<IpNetwork>;
        /// Whether it may send only as itself.
        anti_spoof: bool = true;
        /// Share of the host's CPUs when all are busy, compared with other VMs' weights. Absent: 100.
        cpu_weight: Option<Whole<1, 10000>>;
        /// The most operations a second of root and ephemeral disk together, reading and writing.
        iops: Option<Whole<1, 1000000000>>;
        /// The most MiB a second of root and ephemeral disk together, reading and writing.
        mbps: Option<Whole<1, 1000000000>>;
        /// The availability zone's name for people; kept, without effect on one host.
        zone: Option<String>;
    }
}

document! {
    /// Ports of the host that lead to a VM.
    pub struct PortForward {
        /// The host's port, or a range as `"8000-8010"`.
        host: PortRange;
        /// The VM's, as many. Absent: the same.
        guest: Option<PortRange>;
        /// What is forwarded.
        protocol: Protocol = Protocol::Tcp;
        /// One address of the host. Absent: all.
        address: Option<IpAddr>;
    }
}

document! {
    /// What a managed network may ask for, when the Director has it made.
    pub struct ManagedNetworkCloudProperties {
        /// A network profile with a bridge of our own: `nat`, `routed`, `isolated`.
        profile: String = "nat".into();
        /// Whether VMs may send only as themselves.
        anti_spoof: bool = true;
        /// Ports of the host itself that VMs may use, as `tcp/22`.
        host_services: Vec<HostPort>;
        /// Addresses for networks of type `dynamic`, first and last.
        pool: Option<AddressRange>;
        /// Largest packet, bytes.
        mtu: Option<Mtu>;
    }
}

document! {
    /// What a disk type (or `disk_pools[].cloud_properties`) may ask for.
    pub struct DiskCloudProperties {
        /// A name that the Director gives a disk it has made dynamically. Kept with the disk, without effect.
        name: Option<String>;
        /// Format of the image: `qcow2` grows as the guest writes, `raw` is for speed and external tools.
        format | "type": Format = Format::Qcow2;
        /// Pool of the image. Absent: the state directory.
        pool: Option<String>;
        /// Who caches writes, in QEMU's words: `none` (not the host), `writeback` (the host), `directsync` and `writethrough`
        /// (nobody: each write waits for the disk). None loses what the guest has flushed.
        cache: Cache = Cache::None;
        /// What becomes of blocks the guest discards: `unmap` gives their space back to the host. Absent: `unmap`, and
        /// `ignore` for a disk whose space is preallocated.
        discard: Option<Discard>;
        /// What is there before the guest writes: `off` nothing, `metadata` the tables (qcow2), `falloc` all space reserved,
        /// `full` all space written.
        preallocation: Preallocation = Preallocation::Off;
        /// Whether the image is encrypted (LUKS, by QEMU) with the key of this host.
        encrypted: bool = false;
        /// The most operations a second, reading and writing together.
        iops: Option<Whole<1, 1000000000>>;
        /// The most MiB a second, reading and writing together.
        mbps: Option<Whole<1, 1000000000>>;
    }
}

impl DiskCloudProperties {
    /// Refuses combinations no image can have, or that take back what another property promises.
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
                let hint = "leave 'discard' out, or preallocate nothing";
                return refuse("discard: 'unmap' would give preallocated space back", hint);
            }
            if self.encrypted && self.format == Format::Raw {
                return refuse(
                    "discard: an encrypted raw image can not give space back",
                    "use format 'qcow2'",
                );
            }
        }
        Ok(())
    }

    /// What `discard` is when it is not given: what the other properties allow.
    pub fn effective_discard(&self) -> Discard {
        let keeps =
            self.preallocation.reserves_space() || (self.encrypted && self.format == Format::Raw);
        self.discard.unwrap_or(if keeps { Discard::Ignore } else { Discard::Unmap })
    }
}

document! {
    /// What a subnet may ask for.
    pub struct SubnetCloudProperties {
        /// Network of the configuration. Absent: `default`.
        name: Option<String>;
        /// An existing bridge of the host, instead of a network of the configuration.
        bridge: Option<LinkName>;
        /// A managed network, as create_network answered it.
        network: Option<NetworkCid>;
        /// Whether VMs may send only as themselves.
        anti_spoof: bool = true;
        /// VLAN of the VM's port on a bridge that tells VLANs apart, or of a network with the profile `vlan` that has none
        /// of its own.
        vlan: Option<VlanId>;
        /// With `bridge`: the largest packet the VM is to send, bytes, if that is less than the bridge's.
        mtu: Option<Mtu>;
    }
}

impl Property for NetworkCid {
    const EXPECTED: crate::schema::Expected = crate::schema::Expected::text("the cid of a network");

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let cid = value.as_str().and_then(|text| Self::parse(text).ok());
        cid.ok_or_else(|| SchemaError::value(Self::EXPECTED, value))
    }
}

/// A CPU model with flags. Its characters are those of QEMU's model and flag names, so it can end no option early.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(transparent)]
pub struct CpuModel(pub String);

impl Property for CpuModel {
    const EXPECTED: crate::schema::Expected =
        crate::schema::Expected::text("a CPU model: letters, digits and \"-_.,=+\"");

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

/// Reads `given` over `defaults`, a shallow merge as the Director's own. A default under another spelling gives way.
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

impl Cpi {
    /// Refuses the cloud property `pool` if this host has no such pool.
    pub(super) fn known_pool(&self, asked: Option<&str>) -> Result<()> {
        let Some(asked) = asked else { return Ok(()) };
        if self.config.pools.contains_key(asked) {
            return Ok(());
        }
        let known: Vec<_> = self.config.pools.keys().map(String::as_str).collect();
        let known = if known.is_empty() { "no pools".to_owned() } else { known.join(", ") };
        Err(Error::new(
            ErrorKind::BadRequest,
            "cloud_properties.pool: this host has no pool of that name",
        )
        .hint(format!("the configuration has: {known}")))
    }
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
