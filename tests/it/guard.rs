//! What a guest may send and what reaches it, on a real kernel: ends of cables stand for taps and guests, and send
//! whatever frames a hostile guest could.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use bosh_qemu_cpi::error::Result;
use bosh_qemu_cpi::link_name::LinkName;
use bosh_qemu_cpi::net::change::Port;
use bosh_qemu_cpi::net::{apply, guard};
use bosh_qemu_cpi::store::nic_rules::{Admission, Forward, NicRules};
use bosh_qemu_cpi::store::record::{Keeper, Nic, Segment, Wire};
use bosh_qemu_cpi::sys::packet::PacketSocket;

use crate::support::frames::{EVERYBODY, Mac, arp, ethernet, fragment, ip4, ip6, nd, rs, tcp, udp};
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
struct Lab {
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
    let segment = Segment { network: "lab".into(), bridge, mtu: None, vlan: None, isolated: false, keeper };
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

impl Lab {
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
        assert!(to.hears(frame, PATIENCE), "dropped: {frame:02x?} ({} drops)", self.drops() - before);
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

#[test]
fn a_guest_speaks_ipv4_only_as_itself() {
    // Whether bridged packets come to the host's IP rules changes nothing.
    for called in ["1", "0"] {
        let Some(lab) = Lab::new() else { return };
        let setting = Path::new("/proc/sys/net/bridge/bridge-nf-call-iptables");
        lab.host.run(|| {
            if setting.exists() {
                std::fs::write(setting, called).unwrap();
            }
        });
        speaks_ipv4_only_as_itself(&lab);
    }
}

fn speaks_ipv4_only_as_itself(lab: &Lab) {
    let guest = lab.guest(1, guarded(&["10.0.0.1", "10.0.0.32/28"]));
    let other = lab.guest(2, guarded(&["10.0.0.2"]));
    let frame = |payload: &[u8]| ethernet(EVERYBODY, mac(1), IP4, payload);
    let asks = |sender: (Mac, &str)| ethernet(EVERYBODY, mac(1), ARP, &arp(1, sender, "10.0.0.2"));
    let probes = |target| ethernet(EVERYBODY, mac(1), ARP, &arp(1, (mac(1), "0.0.0.0"), target));

    lab.passes(&guest, &other, &frame(&ip4("10.0.0.1", "10.0.0.2", UDP, &udp(1000, 53))));
    lab.passes(&guest, &other, &frame(&ip4("10.0.0.47", "10.0.0.2", UDP, &udp(1000, 53))));
    lab.passes(&guest, &other, &asks((mac(1), "10.0.0.1")));
    lab.passes(&guest, &other, &asks((mac(1), "10.0.0.32")));
    lab.passes(&guest, &other, &probes("10.0.0.1"));
    lab.passes(&guest, &other, &probes("10.0.0.47"));
    lab.passes(&guest, &other, &frame(&ip4("10.0.0.1", "224.0.0.22", 2, &[0x22, 0, 0, 0, 0, 0, 0, 0])));

    let spoofs = [
        ("MAC", ethernet(EVERYBODY, mac(9), IP4, &ip4("10.0.0.1", "10.0.0.2", UDP, &udp(1, 53)))),
        ("IP", frame(&ip4("10.0.0.2", "10.0.0.2", UDP, &udp(1, 53)))),
        ("IP beside its block", frame(&ip4("10.0.0.48", "10.0.0.2", UDP, &udp(1, 53)))),
        ("IP of nobody", frame(&ip4("0.0.0.0", "255.255.255.255", UDP, &udp(68, 67)))),
        ("DHCP server", frame(&ip4("10.0.0.1", "255.255.255.255", UDP, &udp(67, 68)))),
        ("question whether another's address is free", probes("10.0.0.2")),
        ("IGMP query", frame(&ip4("10.0.0.1", "224.0.0.1", 2, &[0x11, 0, 0, 0, 0, 0, 0, 0]))),
        ("multicast router", frame(&ip4("10.0.0.1", "224.0.0.106", 2, &[0x30, 0, 0, 0, 0, 0, 0, 0]))),
        ("PIM", frame(&ip4("10.0.0.1", "224.0.0.13", 103, &[0x20, 0, 0, 0]))),
        ("ARP sender's IP", asks((mac(1), "10.0.0.2"))),
        ("ARP sender's MAC", asks((mac(9), "10.0.0.1"))),
        ("ARP of another kind", ethernet(EVERYBODY, mac(1), ARP, &[0, 1, 8, 0, 6, 16, 0, 1])),
        (
            "tagged frame",
            ethernet(
                EVERYBODY,
                mac(1),
                0x8100,
                &[&[0, 5, 8, 0][..], &ip4("10.0.0.1", "10.0.0.2", UDP, &udp(1, 53))].concat(),
            ),
        ),
        ("frame of another type", ethernet(EVERYBODY, mac(1), 0x88cc, b"lldp")),
    ];
    for (what, spoofed) in &spoofs {
        lab.drops_it(&guest, &other, what, spoofed);
    }
}

#[test]
fn a_guest_speaks_ipv6_only_as_itself() {
    let Some(lab) = Lab::new() else { return };
    // It would put fragments together.
    let setting = Path::new("/proc/sys/net/bridge/bridge-nf-call-ip6tables");
    lab.host.run(|| {
        if setting.exists() {
            std::fs::write(setting, "0").unwrap();
        }
    });
    let guest = lab.guest(1, guarded(&["fd00::1", "fd00:1::/80"]));
    let other = lab.guest(2, guarded(&["fd00::2"]));
    let frame = |payload: &[u8]| ethernet(EVERYBODY, mac(1), IP6, payload);
    let icmp = |from: &str, message: &[u8]| frame(&ip6(from, "ff02::1", ICMP6, message));
    let (own, foreign) = (Some((2, mac(1))), Some((2, mac(9))));
    const LINK_LOCAL: &str = "fe80::ff:fe00:1";

    lab.passes(&guest, &other, &frame(&ip6("fd00::1", "fd00::2", UDP, &udp(1000, 53))));
    lab.passes(&guest, &other, &frame(&ip6("fd00:1::7", "fd00::2", UDP, &udp(1000, 53))));
    lab.passes(&guest, &other, &icmp("::", &nd(135, "fd00::1", None)));
    lab.passes(&guest, &other, &icmp("fd00::1", &nd(135, "fd00::2", Some((1, mac(1))))));
    lab.passes(&guest, &other, &icmp("fd00::1", &nd(136, "fd00::1", own)));
    lab.passes(&guest, &other, &icmp(LINK_LOCAL, &nd(136, "fd00:1::7", own)));
    lab.passes(&guest, &other, &icmp("fd00::1", &nd(135, "fd00::2", None)));
    lab.passes(&guest, &other, &icmp("::", &[nd(135, "fd00::1", None), vec![14, 1, 0, 0, 0, 0, 0, 0]].concat()));
    lab.passes(&guest, &other, &icmp(LINK_LOCAL, &rs(&[])));
    lab.passes(&guest, &other, &icmp(LINK_LOCAL, &rs(&[&[1, 1][..], &mac(1)].concat())));
    // A large ping in two fragments.
    lab.passes(&guest, &other, &frame(&fragment("fd00::1", ICMP6, 0, true, &[128, 0, 0, 0, 0, 1, 0, 1])));
    lab.passes(&guest, &other, &frame(&fragment("fd00::1", ICMP6, 8, false, b"and more")));

    let spoofs = [
        ("IP", frame(&ip6("fd00::2", "fd00::2", UDP, &udp(1, 53)))),
        ("IP beside its block", frame(&ip6("fd00:1::1:0:0:7", "fd00::2", UDP, &udp(1, 53)))),
        ("DHCPv6 server", frame(&ip6("fd00::1", "fd00::2", UDP, &udp(547, 546)))),
        ("router advertisement", icmp(LINK_LOCAL, &nd(134, "::", None))),
        ("redirect", icmp(LINK_LOCAL, &nd(137, "::", None))),
        ("advertised target", icmp("fd00::1", &nd(136, "fd00::2", own))),
        ("advertised MAC", icmp("fd00::1", &nd(136, "fd00::1", foreign))),
        ("advertiser", icmp("fd00::2", &nd(136, "fd00::1", own))),
        ("second option", icmp("fd00::1", &[nd(136, "fd00::1", own), vec![2, 1], mac(9).to_vec()].concat())),
        ("option that hides another", icmp("fd00::1", &[nd(136, "fd00::1", Some((14, mac(1)))), vec![2, 1]].concat())),
        ("solicitor's MAC", icmp("fd00::1", &nd(135, "fd00::2", Some((1, mac(9)))))),
        ("solicitor", icmp("fd00::2", &nd(135, "fd00::1", None))),
        ("question whether another's address is free", icmp("::", &nd(135, "fd00::2", None))),
        ("solicitor's MAC after another option", {
            let nonce = [14, 1, 0, 0, 0, 0, 0, 0];
            icmp("fd00::1", &[nd(135, "fd00::2", None), nonce.to_vec(), vec![1, 1], mac(9).to_vec()].concat())
        }),
        ("solicitor's second option", {
            icmp("fd00::1", &[nd(135, "fd00::2", Some((1, mac(1)))), vec![1, 1], mac(9).to_vec()].concat())
        }),
        ("MAC of who asks for routers", icmp(LINK_LOCAL, &rs(&[&[1, 1][..], &mac(9)].concat()))),
        ("listener query", icmp(LINK_LOCAL, &nd(130, "::", None))),
        ("inverse advertisement", icmp(LINK_LOCAL, &nd(142, "::", None))),
        ("certificate", icmp(LINK_LOCAL, &nd(149, "::", None))),
        ("multicast router", icmp(LINK_LOCAL, &nd(151, "::", None))),
        ("PIM", frame(&ip6("fd00::1", "ff02::d", 103, &[0x20, 0, 0, 0]))),
        ("advertisement cut off", icmp("fd00::1", &nd(136, "fd00::2", own)[..8])),
        ("advertisement in a tiny fragment", {
            frame(&fragment("fd00::1", ICMP6, 0, true, &nd(136, "fd00::2", foreign)[..8]))
        }),
        ("advertisement whose options go on", {
            frame(&fragment("fd00::1", ICMP6, 0, true, &nd(136, "fd00::1", own)))
        }),
        ("fragment that ends in an option header", {
            frame(&fragment("fd00::1", 60, 0, true, &[ICMP6, 1, 1, 4, 0, 0, 0, 0]))
        }),
        ("fragment that ends before its own header", {
            frame(&fragment("fd00::1", 60, 0, true, &[ICMP6, 0, 1, 4, 0, 0, 0, 0]))
        }),
        ("hop-by-hop header before an advertisement", {
            let behind = [&[ICMP6, 0, 1, 4, 0, 0, 0, 0][..], &nd(134, "::", None)].concat();
            frame(&ip6(LINK_LOCAL, "ff02::1", 0, &behind))
        }),
    ];
    for (what, spoofed) in &spoofs {
        lab.drops_it(&guest, &other, what, spoofed);
    }
}

#[test]
fn a_guest_whose_addresses_a_dhcp_server_gives_keeps_its_mac() {
    let Some(lab) = Lab::new() else { return };
    let guest = lab.guest(1, guarded(&[]));
    let other = lab.guest(2, guarded(&["10.0.0.2"]));
    let frame = |from: Mac, payload: &[u8]| ethernet(EVERYBODY, from, IP4, payload);
    let asks = ip4("0.0.0.0", "255.255.255.255", UDP, &udp(68, 67));
    lab.passes(&guest, &other, &frame(mac(1), &asks));
    lab.passes(&guest, &other, &ethernet(EVERYBODY, mac(1), ARP, &arp(1, (mac(1), "10.0.0.77"), "10.0.0.2")));
    lab.drops_it(&guest, &other, "MAC", &frame(mac(9), &asks));
    lab.drops_it(&guest, &other, "DHCP server", &frame(mac(1), &ip4("10.0.0.77", "10.0.0.2", UDP, &udp(67, 68))));
}

#[test]
fn a_security_group_admits_the_lease_of_who_asks_for_one() {
    let Some(lab) = Lab::new() else { return };
    let roaming = lab.guest(1, NicRules { admits: Some(Vec::new()), ..guarded(&[]) });
    let settled = lab.guest(2, NicRules { admits: Some(Vec::new()), ..guarded(&["10.0.0.2"]) });
    let server = lab.guest(3, NicRules::default());
    let offer4 = |to, port| ethernet(to, mac(3), IP4, &ip4("10.0.0.3", "10.0.0.77", UDP, &udp(67, port)));
    let offer6 = |to| ethernet(to, mac(3), IP6, &ip6("fe80::3", "fe80::ff:fe00:1", UDP, &udp(547, 546)));
    lab.passes(&server, &roaming, &offer4(mac(1), 68));
    lab.passes(&server, &roaming, &offer6(mac(1)));
    lab.drops_it(&server, &roaming, "another port", &offer4(mac(1), 69));
    lab.drops_it(&server, &settled, "a lease nobody wants", &offer4(mac(2), 68));
}

#[test]
fn a_frame_that_bridges_hand_up_unasked_reaches_no_address_of_the_host() {
    let Some(lab) = Lab::new() else { return };
    lab.host.ip(&format!("address add 10.0.0.254/24 dev {BRIDGE}"));
    let guest = lab.guest(1, guarded(&["10.0.0.1"]));
    let frame = ethernet(nearest(0x0e), mac(1), IP4, &ip4("10.0.0.1", "10.0.0.254", UDP, &udp(1, 53)));
    let before = lab.drops();
    guest.wire.send(&frame).unwrap();
    eventually("a counted drop", || (lab.drops() > before).then_some(()));
}

/// For the nearest bridge alone (IEEE 802.1Q, table 8-1).
fn nearest(last: u8) -> Mac {
    [1, 0x80, 0xc2, 0, 0, last]
}

#[test]
fn a_bridge_learns_nothing_from_a_guest() {
    let Some(lab) = Lab::new() else { return };
    let guest = lab.guest(1, guarded(&["10.0.0.1"]));
    let other = lab.guest(2, guarded(&["10.0.0.2"]));
    let free = lab.guest(3, NicRules::default());
    let port_of = |mac: &str| {
        let list = || std::process::Command::new("bridge").args(["-json", "fdb", "show"]).output().unwrap();
        let list: serde_json::Value = serde_json::from_slice(&lab.host.run(list).stdout).unwrap();
        let entry = list.as_array().unwrap().iter().find(|entry| entry["mac"] == mac && entry["master"] == BRIDGE);
        entry.map(|entry| entry["ifname"].as_str().unwrap().to_owned())
    };
    let payload = ip4("10.0.0.1", "10.0.0.2", UDP, &udp(1, 53));
    for last in [0x0e, 0x02, 0x03, 0x0d, 0x0f, 0x00] {
        for from in [mac(2), mac(9)] {
            guest.wire.send(&ethernet(nearest(last), from, IP4, &payload)).unwrap();
        }
    }
    // Behind the others; and who may say anything can not take what belongs to somebody.
    lab.passes(&guest, &other, &ethernet(mac(2), mac(1), IP4, &payload));
    lab.passes(&free, &other, &ethernet(EVERYBODY, mac(2), IP4, &payload));
    lab.passes(&free, &other, &ethernet(EVERYBODY, mac(8), IP4, &payload));
    assert_eq!(port_of("02:00:00:00:00:01").as_deref(), Some("bqport1"));
    assert_eq!(port_of("02:00:00:00:00:02").as_deref(), Some("bqport2"));
    assert_eq!(port_of("02:00:00:00:00:08").as_deref(), Some("bqport3"), "others are learnt");
    assert_eq!(port_of("02:00:00:00:00:09"), None);
}

/// A source, a protocol, ports.
type Admitted<'a> = (&'a str, u8, Option<(u16, u16)>);

fn admits(list: &[Admitted<'_>]) -> NicRules {
    let admission = |(source, protocol, ports): &Admitted<'_>| Admission {
        source: source.parse().unwrap(),
        protocols: (*protocol, *protocol),
        ports: *ports,
    };
    NicRules { admits: Some(list.iter().map(admission).collect()), ..guarded(&["10.0.0.1", "fd00::1"]) }
}

#[test]
fn a_security_group_admits_what_it_names_and_answers() {
    let Some(lab) = Lab::new() else { return };
    let tcp_ports = [("0.0.0.0/0", TCP, Some((80, 90))), ("10.0.0.0/24", TCP, Some((85, 95)))];
    let others = [("10.0.0.0/24", 1, None), ("fd00::/64", UDP, Some((53, 53)))];
    let guest = lab.guest(1, admits(&[&tcp_ports[..], &others].concat()));
    let other = lab.guest(2, NicRules::default());
    let to4 =
        |from: &str, protocol, payload: &[u8]| ethernet(mac(1), mac(2), IP4, &ip4(from, "10.0.0.1", protocol, payload));
    let to6 =
        |from: &str, protocol, payload: &[u8]| ethernet(mac(1), mac(2), IP6, &ip6(from, "fd00::1", protocol, payload));
    let ask4 = |payload: &[u8]| ethernet(mac(2), mac(1), IP4, &ip4("10.0.0.1", "10.0.0.2", UDP, payload));

    for frame in [
        to4("192.0.2.1", TCP, &tcp(1000, 80, 2)),
        to4("10.0.0.2", TCP, &tcp(1000, 95, 2)),
        to4("10.0.0.2", TCP, &tcp(1000, 22, 18)),
        to4("10.0.0.2", 1, &[8, 0, 0, 0, 0, 0, 0, 0]),
        to4("192.0.2.1", 1, &[3, 1, 0, 0, 0, 0, 0, 0]),
        to6("fd00::2", UDP, &udp(1000, 53)),
        to6("fd00::2", ICMP6, &nd(135, "fd00::1", None)),
        ethernet(EVERYBODY, mac(2), ARP, &arp(1, (mac(2), "10.0.0.2"), "10.0.0.1")),
    ] {
        lab.passes(&other, &guest, &frame);
    }
    for (what, frame) in [
        ("port", to4("10.0.0.2", TCP, &tcp(1000, 96, 2))),
        ("port from there", to4("192.0.2.1", TCP, &tcp(1000, 91, 2))),
        ("datagram", to4("10.0.0.2", UDP, &udp(53, 1000))),
        ("ping", to4("192.0.2.1", 1, &[8, 0, 0, 0, 0, 0, 0, 0])),
        ("IPv6 source", to6("fd01::2", UDP, &udp(1000, 53))),
        ("protocol", to4("10.0.0.2", 132, &tcp(1, 80, 0))),
    ] {
        lab.drops_it(&other, &guest, what, &frame);
    }
    // The guest asks, and only the answer comes in.
    lab.passes(&guest, &other, &ask4(&udp(1000, 53)));
    lab.passes(&other, &guest, &to4("10.0.0.2", UDP, &udp(53, 1000)));
    lab.drops_it(&other, &guest, "answer from elsewhere", &to4("10.0.0.3", UDP, &udp(53, 1000)));
    lab.drops_it(&other, &guest, "connection in an answer's place", &to4("10.0.0.2", TCP, &tcp(53, 1000, 2)));
}

#[test]
fn elements_come_and_go_with_their_vm_and_the_tables_with_the_last() {
    let Some(lab) = Lab::new() else { return };
    let tables = || lab.host.run(nftables::tables);
    let guest = lab.guest(1, guarded(&["10.0.0.1"]));
    let other = lab.guest(2, guarded(&["10.0.0.2"]));
    let add = |guest: &Guest| lab.host.run(|| guard::add(std::slice::from_ref(&guest.nic), no_others)).unwrap();
    let remove = |guest: &Guest| lab.host.run(|| guard::remove(std::slice::from_ref(&guest.nic))).unwrap();
    assert_eq!(tables(), [GUARD, GUARD]);
    add(&guest);
    remove(&guest);
    remove(&guest);
    let spoofed = ethernet(EVERYBODY, mac(9), IP4, &ip4("10.0.0.9", "10.0.0.2", UDP, &udp(1, 53)));
    lab.passes(&guest, &other, &spoofed);
    let back = ethernet(EVERYBODY, mac(9), IP4, &ip4("10.0.0.9", "10.0.0.1", UDP, &udp(1, 53)));
    lab.drops_it(&other, &guest, "MAC", &back);
    remove(&other);
    assert_eq!(tables(), Vec::<String>::new());
    remove(&other);

    // Whoever flushed everything gets everything back with the next VM.
    add(&guest);
    lab.host.run(|| nftables::write_table(GUARD, false));
    lab.host
        .run(|| guard::add(std::slice::from_ref(&guest.nic), || Ok(vec![guest.nic.clone(), other.nic.clone()])))
        .unwrap();
    lab.drops_it(&guest, &other, "MAC", &spoofed);
    lab.drops_it(&other, &guest, "MAC", &back);
}

/// Rules, times and packets do not grow with the number of VMs; this shows that so many fit and go.
#[test]
fn two_hundred_vms_come_and_go() {
    let Some(lab) = Lab::new() else { return };
    let rules = |n: u8| NicRules {
        allowed: vec!["10.244.0.0/16".parse().unwrap()],
        forwards: vec![Forward {
            address: None,
            protocol: TCP,
            host: 2000 + u16::from(n) * 10,
            to: std::net::IpAddr::from([10, 0, 0, n]),
            guest: 80,
            count: 3,
        }],
        ..admits(&[("0.0.0.0/0", TCP, Some((80, 90))), ("fd00::/64", UDP, Some((53, 53)))])
    };
    let vms: Vec<_> = (1..=200).map(|n| nic(&format!("bqvm{n}"), n, rules(n))).collect();
    let elements = || lab.host.run(|| nftables::elements(GUARD));
    let mut least = 0;
    for vm in &vms {
        lab.host.run(|| guard::add(std::slice::from_ref(vm), no_others)).unwrap();
        let now = elements();
        assert!(now > least, "{now}");
        least = now;
    }
    // Taps twice, the MAC, three addresses, a block, two admissions, three ports, and that it is guarded and grouped.
    assert_eq!(least, 200 * 14);
    for vm in &vms {
        lab.host.run(|| guard::remove(std::slice::from_ref(vm))).unwrap();
    }
    assert_eq!(lab.host.run(nftables::tables), Vec::<String>::new());
}

/// All of them in one transaction, far larger than a socket takes by default.
#[test]
fn two_thousand_vms_get_their_rules_back_with_the_next() {
    let Some(lab) = Lab::new() else { return };
    let vms: Vec<_> = (0..2000u16)
        .map(|n| nic(&format!("bqvm{n}"), n as u8, guarded(&[&format!("10.0.{}.{}", n / 250, n % 250 + 1)])))
        .collect();
    lab.host.run(|| guard::add(&vms[..1], || Ok(vms.clone()))).unwrap();
    assert!(!lab.host.run(|| guard::is_lost(&vms)).unwrap());
    lab.host.run(|| guard::remove(&vms)).unwrap();
    assert_eq!(lab.host.run(nftables::tables), Vec::<String>::new());
}

#[test]
fn a_forward_leads_from_outside_and_from_the_host_to_a_guest() {
    for (gateway, inside, at_host, outer) in [
        ("10.0.0.254/24", "10.0.0.1/24", "192.0.2.1/24", "192.0.2.2/24"),
        ("fd00::fe/64", "fd00::1/64", "2001:db8::1/64", "2001:db8::2/64"),
    ] {
        let (Some(host), Some(guest), Some(outside)) = (Namespace::new(), Namespace::new(), Namespace::new()) else {
            return;
        };
        let v6 = gateway.contains(':');
        let nodad = if v6 { "nodad" } else { "" };
        host.ip(&format!("link add {BRIDGE} type bridge"));
        host.ip(&format!("link set {BRIDGE} up"));
        host.ip(&format!("address add {gateway} dev {BRIDGE} {nodad}"));
        let forwarding = if v6 { "ipv6/conf/all/forwarding" } else { "ipv4/ip_forward" };
        host.run(|| std::fs::write(format!("/proc/sys/net/{forwarding}"), "1").unwrap());
        host.cable("bqport1", &guest, "eth0");
        guest.ip("link set eth0 address 02:00:00:00:00:01");
        host.cable("uplink", &outside, "eth0");
        let address = |text: &str| text.split_once('/').unwrap().0.to_owned();
        let to: std::net::IpAddr = address(inside).parse().unwrap();
        let forward = |host, address| Forward { address, protocol: TCP, host, to, guest: 80, count: 1 };
        let named = address(at_host).parse().unwrap();
        let elsewhere: std::net::IpAddr = address(outer).parse().unwrap();
        let rules = NicRules {
            forwards: vec![forward(8080, None), forward(8081, Some(named)), forward(8082, Some(elsewhere))],
            ..guarded(&[&address(inside)])
        };
        let vm = nic("bqport1", 1, rules);
        host.run(|| guard::add(std::slice::from_ref(&vm), no_others)).unwrap();
        host.ip(&format!("link set bqport1 master {BRIDGE}"));
        guest.ip(&format!("address add {inside} dev eth0 {nodad}"));
        guest.ip(&format!("route add default via {}", address(gateway)));
        host.ip(&format!("address add {at_host} dev uplink {nodad}"));
        outside.ip(&format!("address add {outer} dev eth0 {nodad}"));

        let listener = guest.run(|| TcpListener::bind((to, 80)).unwrap());
        let connects =
            |from: &Namespace, port| from.run(|| TcpStream::connect_timeout(&(named, port).into(), PATIENCE));
        for (from, port) in [(&outside, 8080), (&outside, 8081), (&host, 8080), (&host, 8081)] {
            let stream = connects(from, port).unwrap_or_else(|error| panic!("{named}:{port}: {error}"));
            let (served, peer) = listener.accept().unwrap();
            assert_eq!(peer.port(), stream.local_addr().unwrap().port());
            drop(served);
        }
        let others = outside.run(|| TcpListener::bind((elsewhere, 8082)).unwrap());
        host.run(|| TcpStream::connect_timeout(&(elsewhere, 8082).into(), PATIENCE)).unwrap();
        others.set_nonblocking(true).unwrap();
        others.accept().expect("another's address is not the host's to forward");
        host.run(|| guard::remove(std::slice::from_ref(&vm))).unwrap();
        assert!(connects(&outside, 8080).is_err(), "the forward is gone with its VM");
    }
}
