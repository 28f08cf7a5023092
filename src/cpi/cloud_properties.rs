//! Cloud properties: what a manifest may ask of us. `docs/cloud-properties.md` is made from these types.

use serde_json::{Map, Value};

use crate::config::AccelChoice;
use crate::document;
use crate::error::Result;
use crate::schema::{Property, SchemaError, Whole};
use crate::store::record::Format;
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
    /// What a disk type (or `disk_pools[].cloud_properties`) may ask for.
    pub struct DiskCloudProperties {
        /// Format of the image: `qcow2` grows as the guest writes, `raw` is for speed and external tools.
        format | "type": Format = Format::Qcow2;
        /// The most operations a second, reading and writing together.
        iops: Option<Whole<1, 1000000000>>;
        /// The most MiB a second, reading and writing together.
        mbps: Option<Whole<1, 1000000000>>;
    }
}

document! {
    /// What a subnet may ask for.
    pub struct SubnetCloudProperties {
        /// Network of the configuration. Absent: `default`.
        name: Option<String>;
        /// An existing bridge of the host, instead of a network of the configuration.
        bridge: Option<String>;
    }
}

/// A CPU model with flags. Its characters are those of QEMU's model and flag names, so it can end no option early.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(transparent)]
pub struct CpuModel(pub String);

impl Property for CpuModel {
    const EXPECTED: &'static str = "a CPU model: letters, digits and \"-_.,=+\"";

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.,=+".contains(c);
        match value.as_str() {
            Some(text) if text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(allowed) => {
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
    let names =
        |spelling: &str| keys.iter().find(|k| k.name == spelling || k.aliases.contains(&spelling)).map(|k| k.name);
    let mut merged = given.clone();
    for (key, value) in defaults {
        let name = names(key).unwrap_or(key);
        if !given.keys().any(|k| names(k).unwrap_or(k) == name) {
            merged.insert(key.clone(), value.clone());
        }
    }
    T::from_json(&Value::Object(merged)).map_err(|e| e.in_request("cloud_properties"))
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
    fn mistakes_are_named_with_what_was_meant() {
        let refusal = |given| vm(&json!({}), &given).unwrap_err().report();
        assert_eq!(refusal(json!({"rma": 1})), "cloud_properties.rma: unknown key; did you mean 'ram'?");
        assert_eq!(
            refusal(json!({"ram": -1})),
            "cloud_properties.ram: expected a whole number of MiB from 1 to 67108864, got -1"
        );
        assert!(refusal(json!({"cpu_model": "host;rm"})).contains("a CPU model"));
        assert!(refusal(json!({"ephemeral_disk": 1.5})).contains("ephemeral_disk"));
    }
}
