//! What QEMU has: devices, nodes, ports.

use std::collections::{BTreeMap, BTreeSet};

use qapi::qmp;

use crate::qmp::error::MonitorError;
use crate::qmp::monitor::Monitor;
use crate::qmp::query::QueryNamedBlockNodes;

/// Where QEMU keeps devices that were given an id.
const PERIPHERAL: &str = "/machine/peripheral";

/// The devices and block nodes of a machine at one moment. Records are settled by it: a disk is attached if its
/// device is here, whatever the record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inventory {
    /// Device ids and their types.
    devices: BTreeMap<String, String>,
    nodes: BTreeSet<String>,
}

impl Inventory {
    /// Looks.
    ///
    /// # Errors
    /// As [`Monitor::execute`].
    pub fn query(monitor: &mut Monitor) -> Result<Self, MonitorError> {
        let devices = devices(monitor)?.collect();
        let nodes = monitor.execute(&QueryNamedBlockNodes { flat: true })?;
        Ok(Self { devices, nodes: nodes.into_iter().map(|node| node.name).collect() })
    }

    /// Whether there is a device with this id: for a disk's, whether the disk is attached.
    pub fn has_device(&self, id: &str) -> bool {
        self.devices.contains_key(id)
    }

    /// Whether there is a block node with this name.
    pub fn has_node(&self, name: &str) -> bool {
        self.nodes.contains(name)
    }

    /// The ids of all devices of QEMU type `device_type`, such as `virtio-blk-pci`.
    pub fn devices_of_type(&self, device_type: &str) -> impl Iterator<Item = &str> {
        self.devices.iter().filter(move |(_, its)| *its == device_type).map(|(id, _)| id.as_str())
    }

    /// The root ports called `prefix` and a number, lowest number first.
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

/// Whether there is a device with this id now.
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

/// Whether root port `port` has no device. Its bus is its child of the same name; each device on it is a link
/// `child[n]` there.
pub(super) fn is_port_free(monitor: &mut Monitor, port: &str) -> Result<bool, MonitorError> {
    let bus = monitor.execute(&qmp::qom_list { path: format!("{PERIPHERAL}/{port}/{port}") })?;
    Ok(!bus.iter().any(|property| property.name.starts_with("child[")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_ordered_by_number_and_nothing_else_is_a_port() {
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
