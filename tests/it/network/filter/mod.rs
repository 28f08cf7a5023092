//! What a guest may send and what reaches it, on a real kernel: ends of cables stand for taps and guests, and send
//! whatever frames a hostile guest could.

mod elements;
mod forwards;
mod masquerade;
mod security_groups;
mod spoofing;

use std::time::{Duration, Instant};

use bosh_qemu_cpi::error::Result;
use bosh_qemu_cpi::link_name::LinkName;
use bosh_qemu_cpi::net::change::Port;
use bosh_qemu_cpi::net::{apply, guard};
use bosh_qemu_cpi::store::nic_rules::{Admission, NicRules};
use bosh_qemu_cpi::store::record::{Keeper, Nic, Segment, Wire};
use bosh_qemu_cpi::sys::packet::PacketSocket;

use crate::support::frames::Mac;
use crate::support::host::eventually;
use crate::support::netns::Namespace;
use crate::support::nftables;

const BRIDGE: &str = "br-guard";
const GUARD: &str = "bosh-qemu-guard";
const PATIENCE: Duration = Duration::from_secs(10);

const ARP: u16 = 0x0806;
const IP4: u16 = 0x0800;
const IP6: u16 = 0x86dd;
const UDP: u8 = 17;
const TCP: u8 = 6;
const ICMP6: u8 = 58;

/// A host with one bridge.
struct Bridge {
    host: Namespace,
}

/// A guest, and what it hears.
struct Guest {
    _namespace: Namespace,
    nic: Nic,
    wire: PacketSocket,
}

fn mac(last: u8) -> Mac {
    [2, 0, 0, 0, 0, last]
}

fn nic(tap: &str, last: u8, rules: NicRules) -> Nic {
    let bridge = LinkName::parse(BRIDGE).unwrap();
    let keeper = Keeper::Operator;
    let segment =
        Segment { network: "lab".into(), bridge, mtu: None, vlan: None, isolated: false, keeper };
    let wire = Wire::Tap { tap: LinkName::parse(tap).unwrap(), segment };
    Nic { network: "lab".into(), mac: mac(last).into(), wire, rules: Some(rules) }
}

fn guarded(addresses: &[&str]) -> NicRules {
    let addresses = addresses.iter().map(|text| text.parse().unwrap()).collect();
    NicRules { anti_spoof: true, addresses, ..NicRules::default() }
}

fn no_others() -> Result<Vec<Nic>> {
    Ok(Vec::new())
}

/// Kernels that say nothing by themselves.
fn silent() -> Option<Namespace> {
    let namespace = Namespace::new()?;
    for which in ["all", "default"] {
        let setting = format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6");
        namespace.run(|| std::fs::write(&setting, "1").unwrap());
    }
    Some(namespace)
}

impl Bridge {
    fn new() -> Option<Self> {
        let host = silent()?;
        host.ip(&format!("link add {BRIDGE} type bridge mcast_snooping 0"));
        host.ip(&format!("link set {BRIDGE} up"));
        Some(Self { host })
    }

    /// A guest whose rules are in force.
    fn guest(&self, last: u8, rules: NicRules) -> Guest {
        let (namespace, port) = (silent().expect("as the first"), format!("bqport{last}"));
        let nic = nic(&port, last, rules);
        self.host.cable(&port, &namespace, "eth0");
        namespace.ip(&format!("link set eth0 address 02:00:00:00:00:{last:02x}"));
        self.host.run(|| guard::add(std::slice::from_ref(&nic), no_others)).unwrap();
        let (port, segment) = Port::of(&nic).unwrap();
        self.host.run(|| apply::ensure(segment, &[port])).unwrap();
        let wire = namespace.run(|| PacketSocket::open("eth0")).unwrap();
        Guest { _namespace: namespace, nic, wire }
    }

    fn drops(&self) -> u64 {
        self.host.run(|| nftables::drops(GUARD))
    }

    /// Has `from` send the frame, which must come to `to`.
    fn passes(&self, from: &Guest, to: &Guest, frame: &[u8]) {
        let before = self.drops();
        from.wire.send(frame).unwrap();
        assert!(
            to.hears(frame, PATIENCE),
            "dropped: {frame:02x?} ({} drops)",
            self.drops() - before
        );
    }

    /// Has `from` send the frame, which must be dropped and counted.
    fn drops_it(&self, from: &Guest, to: &Guest, what: &str, frame: &[u8]) {
        let before = self.drops();
        from.wire.send(frame).unwrap();
        eventually(&format!("a counted drop: {what}"), || (self.drops() > before).then_some(()));
        assert!(!to.hears(frame, Duration::ZERO), "{what} passed");
    }
}

impl Guest {
    /// Whether the frame comes in time. What else comes is passed over.
    fn hears(&self, frame: &[u8], patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while let Some(heard) = self.wire.receive(deadline).unwrap() {
            if heard == frame {
                return true;
            }
        }
        false
    }
}

/// A source, a protocol, ports.
type Admitted<'a> = (&'a str, u8, Option<(u16, u16)>);

fn admits(list: &[Admitted<'_>]) -> NicRules {
    let admission = |(source, protocol, ports): &Admitted<'_>| Admission {
        source: source.parse().unwrap(),
        protocols: (*protocol, *protocol),
        ports: *ports,
    };
    NicRules {
        admits: Some(list.iter().map(admission).collect()),
        ..guarded(&["10.0.0.1", "fd00::1"])
    }
}
