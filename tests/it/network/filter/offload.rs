//! Checksums that a guest leaves to the host, which fills them in after the filter.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;

use bosh_qemu_cpi::net::change::Port;
use bosh_qemu_cpi::net::{apply, filter};
use bosh_qemu_cpi::store::nic_rules::NicRules;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{ARP, Bridge, filtered, mac, nic, no_others};
use crate::support::frames::{BROADCAST, arp, ethernet};
use crate::support::host::eventually;
use crate::support::skip;

/// Where an ARP packet's frame has the sender's IPv4 address.
const SENDER_IP: std::ops::Range<usize> = 28..32;

#[test]
fn leave_checksum_to_the_host_forges_only_with_offload() {
    if !Path::new("/dev/net/tun").exists() {
        return skip("no /dev/net/tun");
    }
    for offload in [false, true] {
        let Some(bridge) = Bridge::new(false) else { return };
        let mut from = tap(&bridge, 1, NicRules { offload, ..filtered(&["10.0.0.1"]) });
        let mut to = tap(&bridge, 2, filtered(&["10.0.0.2"]));
        let honest = ethernet(BROADCAST, mac(1), ARP, &arp(1, (mac(1), "10.0.0.1"), "10.0.0.2"));
        let drops = bridge.drops();
        from.write_all(&[&checksum_over_sender()[..], &honest].concat()).unwrap();
        if offload {
            let forged = receive(&mut to);
            assert_eq!(forged[..SENDER_IP.start], honest[..SENDER_IP.start]);
            assert_ne!(forged[SENDER_IP], honest[SENDER_IP], "the filter has read the other");
        } else {
            eventually("a counted drop", || (bridge.drops() > drops).then_some(()));
            from.write_all(&honest).unwrap();
            assert_eq!(receive(&mut to), honest);
        }
    }
}

/// A virtio-net header (virtio 1.2 §5.1.6) that asks for a checksum, from byte 20 of the frame on,
/// in the last two bytes of [`SENDER_IP`]. The fields are in the machine's byte order.
fn checksum_over_sender() -> [u8; 10] {
    let [start, offset] = [20u16, 10].map(u16::to_ne_bytes);
    [1, 0, 0, 0, 0, 0, start[0], start[1], offset[0], offset[1]]
}

/// A tap on the bridge, made as for a VM.
fn tap(bridge: &Bridge, last: u8, rules: NicRules) -> File {
    let nic = nic(&format!("bqtap{last}"), last, rules);
    let (port, segment) = Port::of(&nic).unwrap();
    let plug = bridge.host.run(|| {
        filter::add(std::slice::from_ref(&nic), no_others).unwrap();
        apply::plug(&port, segment, 1, || Ok((segment.clone(), Vec::new()))).unwrap()
    });
    plug.queues.into_iter().next().unwrap().into()
}

fn receive(tap: &mut File) -> Vec<u8> {
    let mut ready = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut ready, PollTimeout::from(10_000u16)), Ok(1), "no frame");
    let mut frame = vec![0; 2048];
    let length = tap.read(&mut frame).unwrap();
    frame.truncate(length);
    frame
}
