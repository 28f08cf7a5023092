//! The devices, block nodes and ports of a running QEMU.

use std::collections::{BTreeMap, BTreeSet};

use qapi::qmp;

use crate::qmp::error::MonitorError;
use crate::qmp::monitor::Monitor;
use crate::qmp::query::QueryNamedBlockNodes;

/// Path of the devices that have an id, in QEMU's object tree.
const PERIPHERAL: &str = "/machine/peripheral";

/// The devices and block nodes of a machine at one moment. It settles the state of a record: a disk
/// is attached if its device is here, whatever the record states.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inventory {
    /// Device ids and their types.
    devices: BTreeMap<String, String>,
    nodes: BTreeSet<String>,
}

impl Inventory {
    /// Queries QEMU.
    ///
    /// # Errors
    /// Those of [`Monitor::execute`].
    pub fn query(monitor: &mut Monitor) -> Result<Self, MonitorError> {
        let devices = devices(monitor)?.collect();
        let nodes = monitor.execute(&QueryNamedBlockNodes { flat: true })?;
        Ok(Self { devices, nodes: nodes.into_iter().map(|node| node.name).collect() })
    }

    /// Whether a device has this id. A disk is attached if its device is present.
    pub fn has_device(&self, id: &str) -> bool {
        self.devices.contains_key(id)
    }

    /// Whether a block node has this name.
    pub fn has_node(&self, name: &str) -> bool {
        self.nodes.contains(name)
    }

    /// The ids of all devices of QEMU type `device_type`, such as `virtio-blk-pci`.
    pub fn devices_of_type(&self, device_type: &str) -> impl Iterator<Item = &str> {
        self.devices.iter().filter(move |(_, its)| *its == device_type).map(|(id, _)| id.as_str())
    }

    /// The root ports named `prefix` plus a number, in ascending order of the number.
    pub(super) fn ports(&self, prefix: &str) -> Vec<&str> {
        let number = |id: &str| id.strip_prefix(prefix)?.parse::<u32>().ok();
        let mut ports: Vec<_> = self
            .devices_of_type("pcie-root-port")
            .filter_map(|id| Some((number(id)?, id)))
            .collect();
        ports.sort_unstable();
        ports.into_iter().map(|(_, id)| id).collect()
    }
}

/// Queries whether a device has this id.
pub(super) fn has_device(monitor: &mut Monitor, id: &str) -> Result<bool, MonitorError> {
    Ok(devices(monitor)?.any(|(its, _)| its == id))
}

/// Ids and types of all devices that have an id.
fn devices(
    monitor: &mut Monitor,
) -> Result<impl Iterator<Item = (String, String)> + use<>, MonitorError> {
    let properties = monitor.execute(&qmp::qom_list { path: PERIPHERAL.into() })?;
    Ok(properties.into_iter().filter_map(|property| {
        let device_type = property.type_.strip_prefix("child<")?.strip_suffix('>')?.to_owned();
        Some((property.name, device_type))
    }))
}

/// Queries whether root port `port` has no device. The port's bus is a child with the port's name;
/// each device on the bus is a link `child[n]` there.
pub(super) fn is_port_free(monitor: &mut Monitor, port: &str) -> Result<bool, MonitorError> {
    let bus = monitor.execute(&qmp::qom_list { path: format!("{PERIPHERAL}/{port}/{port}") })?;
    Ok(!bus.iter().any(|property| property.name.starts_with("child[")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_sorted_by_number_and_others_are_excluded() {
        let device = |id: &str, its: &str| (id.to_owned(), its.to_owned());
        let inventory = Inventory {
            devices: BTreeMap::from([
                device("hotplug10", "pcie-root-port"),
                device("hotplug9", "pcie-root-port"),
                device("hotplug", "pcie-root-port"),
                device("hotplug2", "virtio-blk-pci"),
                device("fixed0", "pcie-root-port"),
            ]),
            nodes: BTreeSet::new(),
        };
        assert_eq!(inventory.ports("hotplug"), ["hotplug9", "hotplug10"]);
    }
}
