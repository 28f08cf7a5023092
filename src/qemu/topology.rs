//! Slots and addresses of devices on `pcie.0`. They are the same for every VM, so a restart changes
//! no address.
//!
//! ```text
//! slot  0x01 rng   0x02 pvpanic   0x03 root   0x04 ephemeral   0x05 config drive   0x06…0x0d NICs
//!       0x0e…0x1d  hot-plug ports, eight functions a slot          0x1f ICH9 (QEMU's own)
//! ```
//!
//! Devices on `pcie.0` itself cannot be unplugged, neither by QMP nor by the guest (QEMU 10.0:
//! "does not support hotplugging"), so a guest cannot eject its root disk. Root and ephemeral disk
//! come first: an old agent that gets `/dev/sdb` uses the second virtio disk, which must not be the
//! config drive. NICs are in manifest order: `eth0…`.

/// Slot of the random number generator.
pub const RNG: u32 = 0x01;
/// Slot of the panic device.
pub const PANIC: u32 = 0x02;
/// Slot of the root disk.
pub const ROOT: u32 = 0x03;
/// Slot of the ephemeral disk.
pub const EPHEMERAL: u32 = 0x04;
/// Slot of the config drive.
pub const CONFIG_DRIVE: u32 = 0x05;
const NIC: u32 = 0x06;
const PORTS: u32 = 0x0e;

/// Most NICs of a VM.
pub const MAX_NICS: usize = (PORTS - NIC) as usize;
/// Most persistent disks attached to a VM at once.
pub const MAX_PORTS: u32 = (0x1e - PORTS) * 8;

/// Slot of the NIC `index`.
pub fn nic(index: usize) -> u32 {
    debug_assert!(index < MAX_NICS);
    NIC + u32::try_from(index).expect("at most MAX_NICS")
}

/// Prefix of the ids of hot-plug ports; the port's index follows.
pub const PORT_PREFIX: &str = "hotplug";

/// QEMU id of the hot-plug port `index`. The bus behind it has the same name.
pub fn port_id(index: u32) -> String {
    format!("{PORT_PREFIX}{index}")
}

/// Address of the hot-plug port `index` on `pcie.0`: slot and function.
pub fn port_address(index: u32) -> String {
    debug_assert!(index < MAX_PORTS);
    format!("{:#x}.{}", PORTS + index / 8, index % 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_fill_slots_function_by_function() {
        assert_eq!(port_address(0), "0xe.0");
        assert_eq!(port_address(15), "0xf.7");
        assert_eq!(port_address(MAX_PORTS - 1), "0x1d.7");
        assert_eq!((MAX_NICS, MAX_PORTS), (8, 128));
    }
}
