//! The packet filter on a real kernel: what a guest may send and what reaches it. Ends of veth
//! pairs stand for taps and guests and send any frame that a hostile guest could.

mod elements;
mod forwards;
mod masquerade;
mod offload;
mod security_groups;
mod spoofing;

use std::path::Path;
use std::time::{Duration, Instant};

use bosh_qemu_cpi::error::Result;
use bosh_qemu_cpi::link_name::LinkName;
use bosh_qemu_cpi::net::change::Port;
use bosh_qemu_cpi::net::{apply, filter};
use bosh_qemu_cpi::store::nic_rules::{Admission, NicRules};
use bosh_qemu_cpi::store::record::{Keeper, Nic, Segment, Wire};
use bosh_qemu_cpi::sys::packet::PacketSocket;

use crate::support::frames::Mac;
use crate::support::host::eventually;
use crate::support::netns::Namespace;
use crate::support::{nftables, skip};

const BRIDGE: &str = "br-guard";
const GUARD: &str = "bosh-qemu-guard";
const FRAME_TIMEOUT: Duration = Duration::from_secs(10);

const ARP: u16 = 0x0806;
const IP4: u16 = 0x0800;
const IP6: u16 = 0x86dd;
const UDP: u8 = 17;
const TCP: u8 = 6;
const ICMP6: u8 = 58;

/// A host with one bridge, to which guests are connected.
struct Bridge {
    host: Namespace,
    /// Whether br_netfilter hands frames on bridges to the rules of IP packets.
    is_called: bool,
}

/// A guest and a packet socket on its link.
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

fn filtered(addresses: &[&str]) -> NicRules {
    let addresses = addresses.iter().map(|text| text.parse().unwrap()).collect();
    NicRules { anti_spoof: true, addresses, ..NicRules::default() }
}

fn no_others() -> Result<Vec<Nic>> {
    Ok(Vec::new())
}

/// A namespace whose kernel sends no packets by itself.
fn quiet_namespace() -> Option<Namespace> {
    let namespace = Namespace::new()?;
    for which in ["all", "default"] {
        let setting = format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6");
        namespace.run(|| std::fs::write(&setting, "1").unwrap());
    }
    Some(namespace)
}

/// Switches br_netfilter on or off. Prints that it skips and returns `false` if the kernel lacks
/// it.
fn set_calls(host: &Namespace, called: bool) -> bool {
    let setting = |which| format!("/proc/sys/net/bridge/bridge-nf-call-{which}");
    host.run(|| {
        if !Path::new(&setting("iptables")).exists() {
            if called {
                skip("no br_netfilter (modprobe br_netfilter)");
            }
            return !called;
        }
        for which in ["iptables", "ip6tables", "arptables"] {
            std::fs::write(setting(which), if called { "1" } else { "0" }).unwrap();
        }
        true
    })
}

/// Hosts without and with br_netfilter: the filter works on both.
fn bridges() -> impl Iterator<Item = Bridge> {
    [false, true].into_iter().filter_map(Bridge::new)
}

impl Bridge {
    fn new(is_called: bool) -> Option<Self> {
        let host = quiet_namespace()?;
        if !set_calls(&host, is_called) {
            return None;
        }
        host.ip(&format!("link add {BRIDGE} type bridge mcast_snooping 0"));
        host.ip(&format!("link set {BRIDGE} up"));
        Some(Self { host, is_called })
    }

    /// Connects a guest and adds its rules.
    fn guest(&self, last: u8, rules: NicRules) -> Guest {
        let (namespace, port) = (quiet_namespace().expect("as the first"), format!("bqport{last}"));
        let nic = nic(&port, last, rules);
        self.host.cable(&port, &namespace, "eth0");
        namespace.ip(&format!("link set eth0 address 02:00:00:00:00:{last:02x}"));
        self.host.run(|| filter::add(std::slice::from_ref(&nic), no_others)).unwrap();
        let (port, segment) = Port::of(&nic).unwrap();
        self.host.run(|| apply::ensure(segment, &[port])).unwrap();
        let wire = namespace.run(|| PacketSocket::open("eth0")).unwrap();
        Guest { _namespace: namespace, nic, wire }
    }

    fn drops(&self) -> u64 {
        self.host.run(|| nftables::drops(GUARD))
    }

    /// Sends a frame from `from`, which must arrive at `to`.
    fn assert_passes(&self, from: &Guest, to: &Guest, frame: &[u8]) {
        let before = self.drops();
        from.wire.send(frame).unwrap();
        assert!(
            to.receives(frame, FRAME_TIMEOUT),
            "dropped: {frame:02x?} ({} drops)",
            self.drops() - before
        );
    }

    /// Sends a frame from `from`, which must be dropped and counted.
    fn assert_dropped(&self, from: &Guest, to: &Guest, what: &str, frame: &[u8]) {
        let before = self.drops();
        from.wire.send(frame).unwrap();
        eventually(&format!("a counted drop: {what}"), || (self.drops() > before).then_some(()));
        assert!(!to.receives(frame, Duration::ZERO), "{what} passed");
    }
}

impl Guest {
    /// Whether the frame arrives in time. Other frames are ignored.
    fn receives(&self, frame: &[u8], timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        while let Some(received) = self.wire.receive(deadline).unwrap() {
            if received == frame {
                return true;
            }
        }
        false
    }
}

/// Source, protocol and ports that a security group admits.
type Admitted<'a> = (&'a str, u8, Option<(u16, u16)>);

fn admits(list: &[Admitted<'_>]) -> NicRules {
    let admission = |(source, protocol, ports): &Admitted<'_>| Admission {
        source: source.parse().unwrap(),
        protocols: (*protocol, *protocol),
        ports: *ports,
    };
    NicRules {
        admits: Some(list.iter().map(admission).collect()),
        ..filtered(&["10.0.0.1", "fd00::1"])
    }
}
