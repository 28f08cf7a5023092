//! Address probes: asks whether another machine on the wire has an address, before a VM boots with
//! it. The BOSH agent does not ask.
//!
//! IPv4 uses ARP probes (RFC 5227 §2.1.1), IPv6 neighbour solicitations as for duplicate address
//! detection (RFC 4862 §5.4.2). Both have an unspecified source address, so no machine changes its
//! tables. Probes leave by the bridge itself, and answers come to its MAC address.

use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::error::{Error, ErrorKind, Result};
use crate::link_name::LinkName;
use crate::mac::MacAddress;
use crate::sys::packet::PacketSocket;

/// Probes sent for each address: one may be lost.
const PROBES: u32 = 3;
/// How long to wait for replies to one round of probes. Machines of one segment answer within a
/// millisecond; QEMU takes longer to start.
const PROBE_REPLY_TIMEOUT: Duration = Duration::from_millis(100);

const ARP: [u8; 2] = [0x08, 0x06];
const IP6: [u8; 2] = [0x86, 0xdd];
const ICMP6: u8 = 58;

/// Returns the first address of `addresses` that another machine on the bridge's wire answers for,
/// with its MAC address. Takes at most a third of a second. Ignores answers from `own` and from
/// VRRP routers: these share an address that moves between them.
///
/// # Errors
/// [`ErrorKind::Host`] for what the kernel refused.
pub fn find_holder(
    bridge: &LinkName,
    addresses: &[IpAddr],
    own: MacAddress,
) -> Result<Option<(IpAddr, MacAddress)>> {
    let fail = |errno: Errno| {
        let error = Error::new(ErrorKind::Host, format!("probe addresses on bridge '{bridge}'"))
            .because(errno);
        if errno == Errno::EPERM { error.hint(super::NEEDS_ROOT) } else { error }
    };
    let Some(link) = super::link::Links::open()?.find(bridge)? else {
        return Err(fail(Errno::ENODEV));
    };
    let Some(mac) = link.mac else { return Err(fail(Errno::ENODEV)) };
    let socket = PacketSocket::open(bridge.as_str()).map_err(fail)?;
    for _ in 0..PROBES {
        for address in addresses {
            socket.send(&probe(mac, *address)).map_err(fail)?;
        }
        let deadline = Instant::now() + PROBE_REPLY_TIMEOUT;
        while let Some(frame) = socket.receive(deadline).map_err(fail)? {
            let answered = parse_answer(&frame)
                .filter(|(ip, holder)| addresses.contains(ip) && *holder != own && *holder != mac);
            if let Some((ip, holder)) = answered.filter(|(_, holder)| !is_vrrp(*holder)) {
                return Ok(Some((ip, holder)));
            }
        }
    }
    Ok(None)
}

/// Whether the address is one of VRRP's (RFC 9568 §7.3): 00-00-5e-00-01-xx for IPv4,
/// 00-00-5e-00-02-xx for IPv6.
fn is_vrrp(mac: MacAddress) -> bool {
    matches!(mac.octets(), [0, 0, 0x5e, 0, 1 | 2, _])
}

/// Returns the frame that asks for the holder of `address` and has an unspecified source address.
fn probe(mac: MacAddress, address: IpAddr) -> Vec<u8> {
    let mac = mac.octets();
    match address {
        IpAddr::V4(ip) => {
            let head = [&[0xff; 6][..], &mac, &ARP, &[0, 1, 8, 0, 6, 4, 0, 1]].concat();
            [&head[..], &mac, &[0; 4], &[0; 6], &ip.octets()].concat()
        }
        IpAddr::V6(ip) => {
            let [.., a, b, c] = ip.octets();
            // The solicited-node multicast group (RFC 4291 §2.7.1), and that group's MAC address
            // (RFC 2464 §7).
            let group = Ipv6Addr::new(
                0xff02,
                0,
                0,
                0,
                0,
                1,
                0xff00 | u16::from(a),
                u16::from_be_bytes([b, c]),
            );
            let head =
                [&[0x33, 0x33, 0xff, a, b, c][..], &mac, &IP6, &[0x60, 0, 0, 0, 0, 24, ICMP6, 255]]
                    .concat();
            let mut message = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &ip.octets()].concat();
            let sum = checksum(Ipv6Addr::UNSPECIFIED, group, &message);
            message[2..4].copy_from_slice(&sum);
            [&head[..], &Ipv6Addr::UNSPECIFIED.octets(), &group.octets(), &message].concat()
        }
    }
}

/// Returns ICMPv6's checksum, which covers the addresses (RFC 8200 §8.1).
fn checksum(from: Ipv6Addr, to: Ipv6Addr, message: &[u8]) -> [u8; 2] {
    let length = (message.len() as u32).to_be_bytes();
    let all = [&from.octets()[..], &to.octets(), &length, &[0, 0, 0, ICMP6], message].concat();
    let sum: u32 = all
        .chunks(2)
        .map(|word| u32::from(u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    (!(folded as u16)).to_be_bytes()
}

/// Returns the address a frame claims for its sender: any ARP with a sender, or a neighbour
/// advertisement.
fn parse_answer(frame: &[u8]) -> Option<(IpAddr, MacAddress)> {
    let mac = |at: usize| <[u8; 6]>::try_from(frame.get(at..at + 6)?).ok().map(MacAddress::from);
    match <[u8; 2]>::try_from(frame.get(12..14)?).ok()? {
        ARP => {
            let ip = <[u8; 4]>::try_from(frame.get(28..32)?).ok()?;
            Some((IpAddr::from(ip), mac(22)?))
        }
        IP6 if frame.get(20) == Some(&ICMP6) && frame.get(54) == Some(&136) => {
            let ip = <[u8; 16]>::try_from(frame.get(62..78)?).ok()?;
            // An advertisement without a MAC option is from the frame's sender.
            let named = if frame.get(78) == Some(&2) { mac(80) } else { mac(6) };
            Some((IpAddr::from(ip), named?))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_solicitation_as_the_kernel_sends_it() {
        let mac = MacAddress::from([2, 0, 0, 0, 0, 1]);
        let frame = probe(mac, "fd00::12:3456".parse().unwrap());
        assert_eq!(frame[..6], [0x33, 0x33, 0xff, 0x12, 0x34, 0x56]);
        // The sum over a whole message with its checksum is zero.
        let group = Ipv6Addr::from(<[u8; 16]>::try_from(&frame[38..54]).unwrap());
        assert_eq!(checksum(Ipv6Addr::UNSPECIFIED, group, &frame[54..]), [0, 0]);
    }

    #[test]
    fn truncated_frames_are_no_answer() {
        let mac = MacAddress::from([2, 0, 0, 0, 0, 1]);
        for address in ["10.0.0.1", "fd00::1"] {
            let frame = probe(mac, address.parse().unwrap());
            for length in 0..frame.len() {
                assert_ne!(parse_answer(&frame[..length]).map(|(ip, _)| ip), address.parse().ok());
            }
        }
        assert!(is_vrrp("00:00:5e:00:01:07".parse().unwrap()));
    }
}
