//! A network of namespaces: a host, the world outside and machines in place of VMs. No QEMU runs.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use bosh_qemu_cpi::config::Network;
use bosh_qemu_cpi::error::Result;
use bosh_qemu_cpi::link_name::LinkName;
use bosh_qemu_cpi::net::plan::{NicPlan, Requested, Segment};
use bosh_qemu_cpi::net::{apply, plan, profile::Profile};
use bosh_qemu_cpi::schema::Property;
use serde_json::{Value, json};

use super::netns::Namespace;
use super::nftables;

/// The bridge of `nat` networks.
pub const BRIDGE: &str = "bosh-nat0";

/// A host with a link `uplink` to the world outside. The outside has no route to the VMs.
pub struct Topology {
    /// The host.
    pub host: Namespace,
    /// The world outside.
    pub outside: Namespace,
}

impl Topology {
    /// Makes the host and the outside. Prints why and returns `None` if this machine cannot.
    pub fn new() -> Option<Self> {
        let topology = Self { host: Namespace::new()?, outside: Namespace::new()? };
        topology.host.cable("uplink", &topology.outside, "world");
        for (namespace, link, end) in
            [(&topology.host, "uplink", 1), (&topology.outside, "world", 2)]
        {
            namespace.ip(&format!("address add 192.0.2.{end}/24 dev {link}"));
            namespace.ip(&format!("address add 2001:db8::{end}/64 dev {link} nodad"));
        }
        Some(topology)
    }

    /// Makes a machine on the bridge with the address `ip`. Its gateway ends in 1.
    pub fn vm(&self, port: &str, ip: &str) -> Namespace {
        let vm = self.unplugged_vm(port, ip);
        self.host.ip(&format!("link set {port} master {BRIDGE}"));
        vm
    }

    /// The same without its port in the bridge.
    pub fn unplugged_vm(&self, port: &str, ip: &str) -> Namespace {
        let vm = Namespace::new().expect("as the first two");
        self.host.cable(port, &vm, "eth0");
        let (version, length, nodad) =
            if ip.contains(':') { ("-6", 64, "nodad") } else { ("-4", 24, "") };
        vm.ip(&format!("address add {ip}/{length} dev eth0 {nodad}"));
        let gateway = format!("{}1", &ip[..ip.rfind(['.', ':']).expect("an address") + 1]);
        vm.ip(&format!("{version} route add default via {gateway}"));
        vm
    }

    /// Makes or repairs the segment's bridge on the host.
    pub fn ensure(&self, segment: &Segment) -> Result<()> {
        self.host.run(|| apply::ensure(segment, &[]))
    }

    /// Makes a tap with one queue on the host.
    pub fn plug(&self, tap: &str, segment: &Segment) -> Result<apply::Plug> {
        self.host.run(|| {
            apply::plug(&name(tap).into(), segment, 1, || Ok((segment.clone(), Vec::new())))
        })
    }

    /// Closes a tap's descriptors and waits until the tap is gone. A process that another test
    /// forks has copies of all descriptors until it executes its program.
    pub fn unplug(&self, tap: &str, descriptors: impl Into<Vec<OwnedFd>>) {
        drop(descriptors.into());
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.host.link(tap).is_some() {
            assert!(Instant::now() < deadline, "tap {tap} outlives its descriptor");
        }
    }

    /// Removes the segment's bridge from the host if it has no ports.
    pub fn release(&self, segment: &Segment) -> Result<bool> {
        self.host.run(|| apply::release(segment))
    }

    /// State that a call may change: links with settings and addresses, and the nftables
    /// generation. It omits what the kernel changes by itself: timers, carrier, link-local
    /// addresses.
    pub fn state(&self) -> (Vec<String>, u32) {
        let links = self.host.ip_json("address show");
        let settings = |link: &Value| {
            let up = link["flags"].as_array().unwrap().contains(&"UP".into());
            let addresses =
                link["addr_info"].as_array().unwrap().iter().filter(|a| a["scope"] != "link");
            let addresses: Vec<_> =
                addresses.map(|a| format!("{}/{}", a["local"], a["prefixlen"])).collect();
            let keys = ["ifindex", "ifname", "address", "mtu", "master", "ifalias"]
                .map(|key| link[key].to_string());
            format!("{keys:?} up: {up} {addresses:?}")
        };
        (
            links.as_array().unwrap().iter().map(settings).collect(),
            self.host.run(nftables::generation),
        )
    }

    /// Names of the host's links without `lo`.
    pub fn links(&self) -> Vec<String> {
        let links = self.host.ip_json("link show");
        let names = links
            .as_array()
            .unwrap()
            .iter()
            .map(|link| link["ifname"].as_str().unwrap().to_owned());
        names.filter(|name| name != "lo").collect()
    }

    /// The bridge of `nat` networks as `ip` shows it.
    pub fn bridge(&self) -> Value {
        self.host.link(BRIDGE).expect("a bridge")
    }
}

/// Parses a link name.
pub fn name(text: &str) -> LinkName {
    LinkName::parse(text).unwrap()
}

/// The segment of a `nat` network with the given gateway.
pub fn nat(gateway: &str) -> Segment {
    segment(&json!({}), gateway)
}

/// The segment of a configured network for a VM with the given gateway.
pub fn segment(network: &Value, gateway: &str) -> Segment {
    let netmask = if gateway.contains(':') { "ffff:ffff:ffff:ffff::" } else { "255.255.255.0" };
    let requested = Requested {
        netmask: netmask.parse().ok(),
        gateway: gateway.parse().ok(),
        ..Default::default()
    };
    let network = Network::from_json(network).unwrap();
    let profile = Profile::load(&network.profile, None).unwrap();
    match plan::plan_nic("lab", &network, &profile, &requested).unwrap() {
        NicPlan::Bridge(segment) => segment,
        NicPlan::User(user) => panic!("{user:?}"),
    }
}

/// The segment of an operator's bridge.
pub fn existing(bridge: &str) -> Segment {
    plan::existing_bridge(&name(bridge), None, None)
}

/// The kind and the report of an error.
pub fn text(error: &bosh_qemu_cpi::error::Error) -> String {
    format!("{:?}: {}", error.kind(), error.report())
}

/// Source address that the outside sees when `vm` connects to `to`. It is the same for TCP and UDP,
/// and replies must arrive.
pub fn seen_from(topology: &Topology, vm: &Namespace, to: &str) -> IpAddr {
    let address = SocketAddr::new(to.parse().unwrap(), 0);
    let timeout = Some(Duration::from_secs(5));
    let (listener, datagrams) = topology
        .outside
        .run(|| (TcpListener::bind(address).unwrap(), UdpSocket::bind(address).unwrap()));
    let (tcp, udp) = (listener.local_addr().unwrap(), datagrams.local_addr().unwrap());
    datagrams.set_read_timeout(timeout).unwrap();

    let stream = vm.run(|| TcpStream::connect_timeout(&tcp, Duration::from_secs(5)));
    let mut stream = stream.unwrap_or_else(|error| panic!("connect to {tcp}: {error}"));
    stream.set_read_timeout(timeout).unwrap();
    let (mut served, by_tcp) = listener.accept().unwrap();
    stream.write_all(b"ping").unwrap();
    let mut bytes = [0; 4];
    served.set_read_timeout(timeout).unwrap();
    served.read_exact(&mut bytes).unwrap();
    served.write_all(b"pong").unwrap();
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"pong");

    let socket =
        vm.run(|| UdpSocket::bind(if to.contains(':') { "[::]:0" } else { "0.0.0.0:0" }).unwrap());
    socket.set_read_timeout(timeout).unwrap();
    socket.send_to(b"ping", udp).unwrap();
    let (_, by_udp) = datagrams.recv_from(&mut bytes).unwrap();
    datagrams.send_to(b"pong", by_udp).unwrap();
    assert_eq!(socket.recv_from(&mut bytes).unwrap(), (4, udp));
    assert_eq!(by_tcp.ip(), by_udp.ip());
    by_tcp.ip()
}

/// Whether `from` can open a TCP connection to the address `to` of `there`.
pub fn reaches(from: &Namespace, there: &Namespace, to: &str) -> bool {
    let listener = there.run(|| TcpListener::bind((to, 0)).unwrap());
    connects(from, listener.local_addr().unwrap())
}

/// Whether `from` can open a TCP connection to `address`, on which a listener exists.
pub fn connects(from: &Namespace, address: SocketAddr) -> bool {
    match from.run(|| TcpStream::connect_timeout(&address, Duration::from_millis(1500))) {
        Ok(_) => true,
        Err(error) => {
            let silent =
                [ErrorKind::TimedOut, ErrorKind::HostUnreachable, ErrorKind::NetworkUnreachable];
            assert!(silent.contains(&error.kind()), "{error}");
            false
        }
    }
}
