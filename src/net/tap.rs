//! Taps: a VM's end of the wire. A tap of ours is never persistent: the kernel removes it with the last descriptor of
//! it, so neither a killed QEMU nor a killed supervisor leaves one behind.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;

use crate::cid::VmCid;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::link_name::LinkName;
use crate::mac::{MacAddress, digest};
use crate::sys::tun;

const TUN_DEVICE: &str = "/dev/net/tun";
const VHOST_DEVICE: &str = "/dev/vhost-net";

/// The tap of NIC `index` of `vm`: `bq`, ten characters of a hash of both, `n` and the index (its last two digits:
/// they are there for the reader, the hash tells taps apart).
pub fn tap_name(vm: &VmCid, index: usize) -> LinkName {
    const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let hash = digest("tap", &format!("{vm}\0{index}"));
    let tail: String =
        hash[..10].iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect();
    LinkName::parse(&format!("bq{tail}n{}", index % 100)).expect("at most 15 letters and digits")
}

/// The host's end of a tap needs an address of its own. `fe` sorts it behind every other port's: a bridge without a
/// pinned address takes the lowest of its ports, and an operator's bridge must not change with our VMs.
pub(super) fn host_mac(tap: &LinkName) -> MacAddress {
    MacAddress::derived(0xfe, "tap", tap.as_str())
}

/// How many queues the tap of a VM with so many CPUs has: with one for each, none waits for another's packets. More than
/// eight cost interrupts and descriptors and carry no more (the kernel's `netif_get_num_default_rss_queues`).
pub fn queue_count(cpus: u32) -> usize {
    cpus.clamp(1, 8) as usize
}

/// Makes the tap, down and on no bridge. The descriptors, which are closed on exec, are the tap, one for each queue.
pub(super) fn create(name: &LinkName, queues: usize) -> Result<Vec<OwnedFd>> {
    (0..queues).map(|index| open_queue(name, index, queues > 1)).collect()
}

fn open_queue(name: &LinkName, index: usize, several: bool) -> Result<OwnedFd> {
    let device = open(TUN_DEVICE).map_err(|error| {
        error.hint(
            "taps need the kernel module: modprobe tun; in a container, pass /dev/net/tun into it",
        )
    })?;
    let made = if index == 0 {
        tun::create_tap(device.as_fd(), name.as_str(), several)
    } else {
        tun::add_queue(device.as_fd(), name.as_str())
    };
    made.map_err(|errno| {
        let error = Error::os(format!("create tap '{name}'"), errno);
        match errno {
            Errno::EBUSY => error
                .with_kind(ErrorKind::Conflict)
                .hint("a link of that name exists: the VM it belongs to may still run; look with 'ip link'"),
            Errno::EPERM => error.hint(super::NEEDS_ROOT),
            _ => error,
        }
    })?;
    Ok(device.into())
}

/// Opens `/dev/vhost-net` so many times: with it, the kernel moves packets between tap and guest without a detour through
/// QEMU. None where the host has it not; that costs speed, nothing else.
pub(super) fn open_vhost(queues: usize) -> Result<Vec<OwnedFd>> {
    if !Path::new(VHOST_DEVICE).exists() {
        return Ok(Vec::new());
    }
    let opened: Result<_> = (0..queues).map(|_| open(VHOST_DEVICE).map(OwnedFd::from)).collect();
    opened.or_else(|error| {
        tracing::warn!(error = error.report(), "the VM's network does without vhost-net");
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
    fn names_follow_from_vm_and_nic() {
        let vm = VmCid::parse("vm-a").unwrap();
        assert_eq!(tap_name(&vm, 0).as_str(), "bqs3fyslmywnn0");
        assert_eq!(tap_name(&vm, 99).as_str().len(), 15);
        assert_ne!(tap_name(&vm, 0), tap_name(&vm, 100));
        assert_ne!(tap_name(&vm, 11), tap_name(&VmCid::parse("vm-a1").unwrap(), 1));
    }
}
