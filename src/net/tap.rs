//! Taps: the host's end of a VM's NIC. The CPI's taps are never persistent: the kernel removes a
//! tap with its last descriptor, so neither a killed QEMU nor a killed supervisor leaves one
//! behind.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;

use crate::cid::VmCid;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::link_name::LinkName;
use crate::mac::{MacAddress, digest};
use crate::sys::tun::{self, Framing};

const TUN_DEVICE: &str = "/dev/net/tun";
const VHOST_DEVICE: &str = "/dev/vhost-net";

/// Returns the name of the tap of NIC `index` of `vm`: `bq`, ten characters of a hash of both, `n`
/// and the index's last two digits. The digits are for the reader; the hash tells taps apart.
pub fn tap_name(vm: &VmCid, index: usize) -> LinkName {
    const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let hash = digest("tap", &format!("{vm}\0{index}"));
    let tail: String =
        hash[..10].iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect();
    LinkName::parse(&format!("bq{tail}n{}", index % 100)).expect("at most 15 letters and digits")
}

/// Returns the MAC address of the host's end of a tap. `fe` sorts it behind every other port's: a
/// bridge without a fixed address takes the lowest of its ports, and an operator's bridge must not
/// change with the VMs on it.
pub(super) fn host_mac(tap: &LinkName) -> MacAddress {
    MacAddress::derived(0xfe, "tap", tap.as_str())
}

/// Returns how many queues the tap of a VM with `cpus` CPUs has. With one queue for each CPU, none
/// waits for another's packets. More than eight cost interrupts and descriptors and carry no more
/// (the kernel's `netif_get_num_default_rss_queues`).
pub fn queue_count(cpus: u32) -> usize {
    cpus.clamp(1, 8) as usize
}

/// Creates the tap, down and on no bridge. Returns one descriptor for each queue. They close on
/// exec, and the tap exists only while one of them is open.
pub(super) fn create(name: &LinkName, framing: Framing, queues: usize) -> Result<Vec<OwnedFd>> {
    (0..queues).map(|index| open_queue(name, framing, index, queues > 1)).collect()
}

fn open_queue(name: &LinkName, framing: Framing, index: usize, several: bool) -> Result<OwnedFd> {
    let device = open(TUN_DEVICE).map_err(|error| {
        error.hint(
            "taps need the kernel module: modprobe tun; in a container, pass /dev/net/tun into it",
        )
    })?;
    let made = if index == 0 {
        tun::create_tap(device.as_fd(), name.as_str(), framing, several)
    } else {
        tun::add_queue(device.as_fd(), name.as_str(), framing)
    };
    made.map_err(|errno| {
        let error = Error::os(format!("create tap '{name}'"), errno);
        match errno {
            Errno::EBUSY => error.with_kind(ErrorKind::Conflict).hint(format!(
                "link '{name}' exists; its VM may still run: ip -details link show {name}"
            )),
            Errno::EPERM => error.hint(super::NEEDS_ROOT),
            _ => error,
        }
    })?;
    Ok(device.into())
}

/// Opens `/dev/vhost-net` once for each queue: with it, the kernel moves packets between tap and
/// guest without a detour through QEMU. Returns none if the host lacks the device; the VM's network
/// is then slower.
pub(super) fn open_vhost(queues: usize) -> Result<Vec<OwnedFd>> {
    if !Path::new(VHOST_DEVICE).exists() {
        return Ok(Vec::new());
    }
    let opened: Result<_> = (0..queues).map(|_| open(VHOST_DEVICE).map(OwnedFd::from)).collect();
    opened.or_else(|error| {
        tracing::warn!(error = error.report(), "the VM's network runs without vhost-net");
        Ok(Vec::new())
    })
}

fn open(device: &str) -> Result<File> {
    File::options().read(true).write(true).open(device).at("open", Path::new(device))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cid::Cid;

    #[test]
    fn a_taps_name_depends_on_vm_and_nic() {
        let vm = VmCid::parse("vm-a").unwrap();
        assert_eq!(tap_name(&vm, 0).as_str(), "bqs3fyslmywnn0");
        assert_eq!(tap_name(&vm, 99).as_str().len(), 15);
        assert_ne!(tap_name(&vm, 0), tap_name(&vm, 100));
        assert_ne!(tap_name(&vm, 11), tap_name(&VmCid::parse("vm-a1").unwrap(), 1));
    }
}
