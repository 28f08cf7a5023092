//! How long each method of the contract may take. The configuration key `deadlines` overrides it.

use std::time::Duration;

/// How long a method may take where the configuration sets no limit. `docs/operating.md` lists
/// these.
pub fn default_timeout(method: &str) -> Duration {
    Duration::from_secs(match method {
        "snapshot_disk" | "update_disk" => 3600,
        "create_stemcell" => 1800,
        "create_vm" | "reboot_vm" | "detach_disk" => 300,
        "attach_disk" | "delete_vm" | "create_disk" | "resize_disk" => 120,
        _ => 60,
    })
}
