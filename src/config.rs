//! The configuration, `cpi.json`: the operator's settings of this host. Every key has a working
//! default.
//!
//! A request's context carries the properties of a cpi-config entry. Those in [`CONTEXT_KEYS`]
//! override keys of the file. The list is closed: a context cannot choose other directories or
//! programs. `docs/config.md` is generated from the types here.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use ipnetwork::IpNetwork;
use serde_json::{Map, Value};

use crate::link_name::LinkName;
use crate::ranges::{AddressRange, HostPort, IpProtocol, PortRange};
use crate::schema::{Expected, Property, Redacted, SchemaError, Whole};
use crate::{choice, document};

mod document;
pub mod transport;
mod validate;

pub use document::{Document, path};
pub use transport::{HostEntry, RemoteCallers, Transport, TransportKind};
pub use validate::{MAX_HOSTS, METHODS, without_unknown_deadlines};

/// The configuration file without `--config` and [`ENVIRONMENT`].
pub const DEFAULT_FILE: &str = "/etc/bosh-qemu-cpi/cpi.json";
/// Environment variable with the path of the configuration file.
pub const ENVIRONMENT: &str = "BOSH_QEMU_CPI_CONFIG";
/// The keys that a request's context may override.
pub const CONTEXT_KEYS: &[&str] =
    &["agent", "deadlines", "disk_defaults", "hosts", "transport", "vm_defaults"];
/// The context keys about VMs, which go to the host with the request. The other context keys select
/// the host.
pub const HOST_KEYS: &[&str] = &["agent", "deadlines", "disk_defaults", "vm_defaults"];

document! {
    /// The whole configuration.
    pub struct Config {
        /// Directory of everything that must survive a reboot: records, images, disks. Mode 0700.
        state_dir: PathBuf = "/var/lib/bosh-qemu-cpi".into();
        /// Directory of sockets and pid files of running VMs. A reboot empties it. At most 40
        /// bytes, because a socket's path has at most 107.
        run_dir: PathBuf = "/run/bosh-qemu-cpi".into();
        /// QEMU: programs, accelerator and defaults of its VMs.
        qemu: Qemu = Qemu::absent().expect("every key of qemu has a default");
        /// Networks of this host, by name. A subnet's cloud property `name` chooses one; without
        /// it, the network is `default`. Absent: one network `default` with the profile `nat`.
        networks: BTreeMap<String, Network> =
            BTreeMap::from([("default".to_owned(), Network::nat())]);
        /// Directories for images, by name, on any filesystem. The cloud property `pool` of a disk
        /// or a VM chooses one; without it, images are in `state_dir`.
        pools: BTreeMap<String, Pool>;
        /// Pool of the stemcells' images. Absent: they are in `state_dir`.
        stemcell_pool: Option<String>;
        /// Whether the images on a filesystem may together grow beyond its size. `false`: a new
        /// image counts with its full size, and space that existing images may still grow into is
        /// not free.
        overcommit: bool = true;
        /// File with the key of encrypted disks: 32 to 4096 bytes of text, readable by root only.
        /// Absent: `disk.key` in `state_dir`, generated with the first encrypted disk.
        key_file: Option<PathBuf>;
        /// Directory of network profiles `<name>.toml`. They take precedence over built-in
        /// profiles.
        network_profiles_dir: Option<PathBuf>;
        /// Range for the subnets of managed networks that have no range of their own.
        managed_range: IpNetwork = "10.208.0.0/12".parse().expect("a subnet");
        /// Security groups, by name: lists of rules. Each rule allows new connections to the VMs
        /// that have the group in their cloud property `security_groups`.
        security_groups: BTreeMap<String, Vec<GroupRule>>;
        /// Defaults of the agents' settings. The Director's env overrides them.
        agent: Agent = Agent::absent().expect("every key of agent has a default");
        /// Time limits of CPI methods in seconds, by method. `docs/operating.md` lists the
        /// defaults.
        deadlines: BTreeMap<String, Whole<1, 86400>>;
        /// `on-crash`: a VM's supervisor starts it again after a crash of QEMU, at most 3 times in
        /// 10 minutes. `never`: the VM stays off until the Director's resurrector recreates it.
        restart: Restart = Restart::OnCrash;
        /// Limits of concurrent starts and of memory.
        limits: Limits = Limits::absent().expect("every key of limits has a default");
        /// What happens if the host cannot confine QEMU fully. `strict`: the VM does not start.
        /// `best-effort`: it starts with the steps that work. `off`: QEMU runs as root without
        /// confinement, for debugging only.
        hardening: Hardening = Hardening::Strict;
        /// The way of calls to the host that runs the VMs. Absent: this machine is the host.
        transport: Transport = Transport::absent().expect("every key of transport has a default");
        /// Several hosts, instead of one `transport`. The scheduler puts each VM on a host with
        /// room for it.
        hosts: Vec<HostEntry>;
        /// Permissions of callers that connect through `bosh-qemu-cpi host serve`.
        remote_callers: RemoteCallers =
            RemoteCallers::absent().expect("every key of remote_callers has a default");
        /// The log on standard error.
        log: Log = Log::absent().expect("every key of log has a default");
        /// Defaults of VMs' cloud properties.
        vm_defaults: Map<String, Value>;
        /// Defaults of disks' cloud properties.
        disk_defaults: Map<String, Value>;
    }
}

document! {
    /// Programs of QEMU, and defaults of its VMs.
    pub struct Qemu {
        /// Path of the emulator.
        binary: PathBuf = "/usr/bin/qemu-system-x86_64".into();
        /// Path of `qemu-img`.
        img_binary: PathBuf = "/usr/bin/qemu-img".into();
        /// Accelerator. `auto` is KVM if the probe's guest runs under it, otherwise TCG (emulation)
        /// with a warning. `kvm` refuses VMs where the guest does not run.
        accel: AccelChoice = AccelChoice::Auto;
        /// CPU model in QEMU's words. Absent: `host` with KVM, or the model that worked for the
        /// probe's guest; `max` with TCG.
        cpu: Option<String>;
        /// `auto`: QEMU uses io_uring if the kernel and QEMU support it. `off`: QEMU does not use
        /// it.
        io_uring: IoUring = IoUring::Auto;
        /// Machine template of VMs without the cloud property `machine`.
        template: String = "q35".into();
        /// Directory of machine templates `<name>.toml`. They take precedence over built-in
        /// templates.
        templates_dir: Option<PathBuf>;
        /// Hot-plug slots of a VM: the most persistent disks that it can have at once.
        hotplug_slots: Whole<0, 128> = Whole::of(16);
    }
}

document! {
    /// A network of this host.
    pub struct Network {
        /// Network profile: how the network is connected. Built in are `nat`, `routed`, `isolated`,
        /// `bridge`, `vlan` and `user`; `docs/networking.md` draws each.
        profile: String = "nat".into();
        /// Name of the bridge. Absent: that of the profile. The profile `bridge` has none and needs
        /// an existing bridge.
        bridge: Option<LinkName>;
        /// Profile `vlan`: the link whose VLAN is used, instead of a bridge that filters VLANs.
        uplink: Option<LinkName>;
        /// Profile `vlan`: the VLAN. Absent: that of the request.
        vlan: Option<VlanId>;
        /// Subnet of a network whose gateway is this host, as `10.0.0.0/24`. Absent: from the
        /// netmask of each request.
        subnet: Option<IpNetwork>;
        /// This host's address in the subnet. Absent: the gateway of the request.
        gateway: Option<std::net::IpAddr>;
        /// First and last address for networks of type `dynamic`: `10.0.0.100-10.0.0.199`. Absent:
        /// all of `subnet`.
        pool: Option<AddressRange>;
        /// Whether VMs may send only from their own MAC and IP addresses.
        anti_spoof: bool = true;
        /// Whether VMs with `anti_spoof` leave checksums and segments to the host. It is faster,
        /// and lets a guest overwrite two bytes of a frame after the filter: addresses and ports.
        offload: bool = false;
        /// Whether a start first probes the wire for the VM's addresses, with ARP and neighbour
        /// discovery. Absent: `true` where machines other than this host's VMs can have them, on an
        /// operator's bridge and on VLANs; `false` elsewhere.
        conflict_probe: Option<bool>;
        /// Ports of this host that VMs may use, as `tcp/22`, on a bridge that the CPI makes. Ping
        /// is always allowed.
        host_services: Vec<HostPort>;
        /// MTU in bytes. Absent: that of the default route's link for bridges that the CPI makes,
        /// that of the bridge for others.
        mtu: Option<Mtu>;
    }
}

/// A VLAN id.
pub type VlanId = Whole<1, 4094>;
/// An MTU, bytes.
pub type Mtu = Whole<576, 65535>;

document! {
    /// A rule of a security group: new connections that it allows.
    pub struct GroupRule {
        /// Protocol. `all` is every IP protocol, `icmp` is ICMP and ICMPv6.
        protocol: IpProtocol;
        /// A destination port or a range, as `"8000-8010"`. Absent: all. Only with `tcp`, `udp` and
        /// `sctp`.
        ports: Option<PortRange>;
        /// Source addresses. Absent: all.
        source: Option<IpNetwork>;
    }
}

document! {
    /// A directory for images.
    pub struct Pool {
        /// The directory. It must exist: the CPI never makes it, or images could fill the
        /// filesystem below an unmounted pool.
        path: PathBuf;
        /// Whether other hosts use the directory, too (NFS). It must then be on another filesystem
        /// than `state_dir` and `/`.
        shared: bool = false;
    }
}

document! {
    /// Defaults of the agents' settings. The Director's env overrides them.
    pub struct Agent {
        /// URL of the message bus: `nats://…` for a Director's VMs,
        /// `https://user:password@0.0.0.0:6868` for create-env.
        mbus: Redacted<Option<String>>;
        /// Time servers.
        ntp: Vec<String>;
        /// Blobstore, in the form of the agent's settings: `{"provider": …, "options": {…}}`.
        blobstore: Redacted<Map<String, Value>>;
    }
}

document! {
    /// Limits of concurrent starts and of memory.
    pub struct Limits {
        /// Most VMs that boot at the same time; further VMs wait. Absent: one for each CPU of the
        /// host.
        parallel_boots: Option<Whole<1, 512>>;
        /// `guaranteed`: memory that running VMs have not touched yet is reserved for them.
        /// `overcommit`: a VM starts if its memory is available now.
        memory: Memory = Memory::Guaranteed;
        /// Memory in MiB that is reserved for the host's programs and page cache.
        memory_reserve_mib: Whole<0, 1048576> = Whole::of(512);
    }
}

document! {
    /// The log on standard error.
    pub struct Log {
        /// Least severe level that is logged.
        level: LogLevel = LogLevel::Info;
        /// Format of an event: one line of text, or one JSON object.
        format: LogFormat = LogFormat::Text;
    }
}

choice! {
    /// Configured accelerator.
    pub enum AccelChoice ("\"auto\", \"kvm\" or \"tcg\"") {
        /// KVM if the probe's guest runs under it, otherwise TCG.
        Auto = "auto",
        /// KVM. Without it, no VM starts.
        Kvm = "kvm",
        /// Emulation by QEMU.
        Tcg = "tcg",
    }
}

choice! {
    /// Whether QEMU may use io_uring for its images.
    pub enum IoUring ("\"auto\" or \"off\"") {
        /// If the kernel and QEMU support it.
        Auto = "auto",
        /// Linux AIO, or threads for images that use the page cache.
        Off = "off",
    }
}

choice! {
    /// Memory that a start of a VM may use.
    pub enum Memory ("\"guaranteed\" or \"overcommit\"") {
        /// Available memory, minus memory that running VMs have not touched yet.
        Guaranteed = "guaranteed",
        /// Available memory. For labs whose VMs have more memory than the host.
        Overcommit = "overcommit",
    }
}

choice! {
    /// Restart policy of crashed VMs.
    pub enum Restart ("\"on-crash\" or \"never\"") {
        /// The supervisor starts the VM again with back-off, at most 3 times in 10 minutes.
        OnCrash = "on-crash",
        /// The VM stays off until the Director's resurrector recreates it.
        Never = "never",
    }
}

choice! {
    /// Handling of confinement steps that the host cannot do.
    pub enum Hardening ("\"strict\", \"best-effort\" or \"off\"") {
        /// Such a step fails the start.
        Strict = "strict",
        /// Such a step is left out and logged.
        BestEffort = "best-effort",
        /// QEMU runs as root, without confinement. For debugging.
        Off = "off",
    }
}

choice! {
    /// Severity of log events.
    pub enum LogLevel ("\"error\", \"warn\", \"info\", \"debug\" or \"trace\"") {
        /// A call failed.
        Error = "error",
        /// A call succeeded with a restriction.
        Warn = "warn",
        /// The actions of a call, in a few lines.
        Info = "info",
        /// Every step.
        Debug = "debug",
        /// Every message to QEMU and to the kernel.
        Trace = "trace",
    }
}

choice! {
    /// Format of log events.
    pub enum LogFormat ("\"text\" or \"json\"") {
        /// One line of text.
        Text = "text",
        /// One JSON object.
        Json = "json",
    }
}

impl Network {
    /// The network `default` of a configuration without networks.
    pub fn nat() -> Self {
        Self::absent().expect("every key of a network has a default")
    }
}

impl Config {
    /// Time limit of `method`: the operator's, else `default`.
    pub fn deadline(&self, method: &str, default: Duration) -> Duration {
        self.deadlines.get(method).map_or(default, |seconds| Duration::from_secs(seconds.get()))
    }
}

impl Property for IpNetwork {
    const EXPECTED: Expected = Expected::address("a subnet such as \"10.0.0.0/24\"");

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let network = value.as_str().and_then(|text| text.parse::<IpNetwork>().ok());
        network
            .filter(|n| n.ip() == n.network())
            .ok_or_else(|| SchemaError::value(Self::EXPECTED, value))
    }
}

impl Property for std::net::IpAddr {
    const EXPECTED: Expected = Expected::address("an IP address");

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        value
            .as_str()
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| SchemaError::value(Self::EXPECTED, value))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_empty_document_is_a_configuration() {
        let config = Config::from_json(&json!({})).unwrap();
        assert_eq!(config.networks["default"].profile, "nat");
        assert_eq!(config.qemu.hotplug_slots.get(), 16);
    }

    #[test]
    fn an_error_names_the_key_and_the_value() {
        let refusal = |value| Config::from_json(&value).unwrap_err().to_string();
        assert_eq!(
            refusal(json!({"qemu": {"acel": "kvm"}})),
            "qemu.acel: unknown key; did you mean 'accel'?"
        );
        assert_eq!(
            refusal(json!({"networks": {"a": {"mtu": 1}}})),
            "networks.a.mtu: expected a whole number from 576 to 65535, got 1"
        );
        assert_eq!(
            refusal(json!({"networks": {"a": {"subnet": "10.0.0.1/24"}}})),
            "networks.a.subnet: expected a subnet such as \"10.0.0.0/24\", got \"10.0.0.1/24\""
        );
    }

    #[test]
    fn ports_of_a_protocol_without_ports_are_refused() {
        let group = |rule: Value| {
            let config = Config::from_json(&json!({"security_groups": {"web": [rule]}}))
                .and_then(Config::validated);
            config.map(drop).map_err(|error| error.to_string())
        };
        for protocol in [json!("tcp"), json!(17), json!("sctp")] {
            assert_eq!(group(json!({"protocol": protocol, "ports": 80})), Ok(()));
        }
        let refused = "security_groups.web.0.ports: expected ports only with \"tcp\", \"udp\" or \
                       \"sctp\", got ports with ";
        for (protocol, named) in
            [(json!("icmp"), "\"icmp\""), (json!("vrrp"), "112"), (json!("all"), "\"all\"")]
        {
            assert_eq!(group(json!({"protocol": protocol})), Ok(()));
            let refused = Err(format!("{refused}{named}"));
            assert_eq!(group(json!({"protocol": protocol, "ports": 80})), refused);
        }
    }

    #[test]
    fn two_hosts_with_one_name_are_refused() {
        let unix = json!({"kind": "unix"});
        let twice =
            json!({"hosts": [{"name": "a", "transport": unix}, {"name": "a", "transport": unix}]});
        let error = Config::from_json(&twice).and_then(Config::validated).unwrap_err();
        assert_eq!(
            error.to_string(),
            "hosts.1.name: expected a name of its own, got \"a\", which is the name of another host"
        );
    }

    #[test]
    fn errors_of_a_file_do_not_quote_credentials() {
        let secret = "hunter2";
        for value in [
            json!({"agent": secret}),
            json!({"agent": {"mbus": [secret]}}),
            json!({"agent": {"mbus": 7777}}),
            json!({"agent": {"blobstore": secret}}),
            json!({"transport": {"private_key": {"key": secret}}}),
            json!({"transport": {"host_key": secret}}),
            json!({"hosts": [{"name": "a", "transport": {"private_key": 7777}}]}),
            json!({"vm_defaults": secret}),
        ] {
            let error = Config::from_json(&value).unwrap_err().in_file("cpi.json").report();
            assert!(!error.contains(secret) && !error.contains("7777"), "{error}");
        }
        let error = Config::from_json(&json!({"qemu": {"accel": "KVM"}})).unwrap_err();
        assert_eq!(
            error.in_file("cpi.json").report(),
            "'cpi.json': qemu.accel: expected \"auto\", \"kvm\" or \"tcg\", got \"KVM\"; did you mean \
             \"kvm\"?"
        );
    }

    #[test]
    fn credentials_do_not_show_in_debug() {
        let config = Config::from_json(
            &json!({"agent": {"mbus": "nats://u:hunter2@h", "blobstore": {"password": "hunter2"}}}),
        )
        .unwrap();
        assert!(!format!("{config:?}").contains("hunter2"));
    }
}
