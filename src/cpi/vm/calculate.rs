//! calculate_vm_cloud_properties: a manifest's `vm_resources` as cloud properties of this CPI.

use serde_json::{Map, Value, json};

use crate::cpi::contract::VmResources;

/// The cloud properties of a VM with these resources.
pub(in crate::cpi) fn calculate(resources: &VmResources) -> Map<String, Value> {
    let properties = json!({
        "cpu": resources.cpu.get(),
        "ram": resources.ram.get(),
        "ephemeral_disk": resources.ephemeral_disk_size.get(),
    });
    properties.as_object().cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpi::properties::{VmCloudProperties, read};
    use crate::schema::Property;

    #[test]
    fn what_is_answered_is_what_create_vm_takes() {
        let resources =
            VmResources::from_json(&json!({"ram": 2048, "cpu": 2, "ephemeral_disk_size": 4096}))
                .unwrap();
        let properties: VmCloudProperties = read(&Map::new(), &calculate(&resources)).unwrap();
        assert_eq!((properties.cpu.get(), properties.ram.get()), (2, 2048));
        assert_eq!(properties.ephemeral_disk.unwrap().get(), 4096);
    }
}
