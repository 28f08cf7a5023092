//! `cpi.json`: what the operator decides about this host. Every key has a default that runs.
//!
//! A cpi-config entry's properties arrive in the request's context; those named in [`CONTEXT_KEYS`] replace the
//! file's keys of the same name. The list is closed: a context can not point the CPI at other directories or
//! programs. The reference in `docs/config.md` is made from these types.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use ipnetwork::IpNetwork;
use serde_json::{Map, Value};

use crate::link_name::LinkName;
use crate::ranges::{AddressRange, HostPort, IpProtocol, PortRange};
use crate::schema::{Property, Redacted, SchemaError, Whole};
use crate::{choice, document};

mod document;
pub mod transport;

pub use document::{Document, path};
pub use transport::{HostEntry, RemoteCallers, Transport, TransportKind};

/// Read when neither `--config` nor [`ENVIRONMENT`] names a file, if it is there.
pub const DEFAULT_FILE: &str = "/etc/bosh-qemu-cpi/cpi.json";
/// Names the file to read.
pub const ENVIRONMENT: &str = "BOSH_QEMU_CPI_CONFIG";
/// The keys a request's context may override.
pub const CONTEXT_KEYS: &[&str] =
    &["agent", "deadlines", "disk_defaults", "hosts", "transport", "vm_defaults"];
/// Those of them that are about the VMs: they go with the request to the host. The others only say which host that is.
pub const HOST_KEYS: &[&str] = &["agent", "deadlines", "disk_defaults", "vm_defaults"];

document! {
    /// The whole configuration.
    pub struct Config {
        /// Where everything that must survive a reboot is kept: records, images, disks. Mode 0700.
        state_dir: PathBuf = "/var/lib/bosh-qemu-cpi".into();
        /// Where sockets and pid files of running VMs are kept. Emptied by a reboot; at most 40 bytes, because socket paths end at 107.
        run_dir: PathBuf = "/run/bosh-qemu-cpi".into();
        /// How QEMU is run.
        qemu: Qemu = Qemu::absent().expect("every key of qemu has a default");
        /// Networks of this host by name. A subnet's cloud property `name` picks one; without it, `default` is taken.
        /// When this key is absent, there is one network `default` with the profile `nat`.
        networks: BTreeMap<String, Network> = BTreeMap::from([("default".to_owned(), Network::nat())]);
        /// Directories for images by name, on whatever filesystem. The cloud property `pool` of a disk or a VM picks one;
        /// without it, images are in the state directory.
        pools: BTreeMap<String, Pool>;
        /// The pool stemcells' images are in. Absent: the state directory.
        stemcell_pool: Option<String>;
        /// Whether thin images together may promise more than their filesystem has. If not, a new one counts in full, and
        /// space that others may still grow into is not free.
        overcommit: bool = true;
        /// The key of encrypted disks: a file, root's alone, with 32 bytes of text or more. Absent: `disk.key` in the state
        /// directory, made with the first encrypted disk.
        key_file: Option<PathBuf>;
        /// A directory whose `<name>.toml` files come before the built-in network profiles.
        network_profiles_dir: Option<PathBuf>;
        /// Where subnets of managed networks come from whose range the Director leaves to us.
        managed_range: IpNetwork = "10.208.0.0/12".parse().expect("a subnet");
        /// What may begin to speak to VMs that name the group in their cloud property `security_groups`, by group.
        security_groups: BTreeMap<String, Vec<GroupRule>>;
        /// What every agent is told unless the Director's env says otherwise.
        agent: Agent = Agent::absent().expect("every key of agent has a default");
        /// Seconds a method may take, by method name. `docs/operating.md` lists the defaults.
        deadlines: BTreeMap<String, Whole<1, 86400>>;
        /// Whether a VM whose QEMU crashed is started again by its supervisor.
        restart: Restart = Restart::OnCrash;
        /// How much is done at once.
        limits: Limits = Limits::absent().expect("every key of limits has a default");
        /// How much confinement of QEMU may be missing.
        hardening: Hardening = Hardening::Strict;
        /// How calls reach the host that runs the VMs. Absent: this is the host.
        transport: Transport = Transport::absent().expect("every key of transport has a default");
        /// Several hosts that share the calls: each VM is put where there is room. Instead of `transport`.
        hosts: Vec<HostEntry>;
        /// What this host leaves to callers that come through `host serve`.
        remote_callers: RemoteCallers = RemoteCallers::absent().expect("every key of remote_callers has a default");
        /// What is written to standard error.
        log: Log = Log::absent().expect("every key of log has a default");
        /// Cloud properties of VMs that a request does not give.
        vm_defaults: Map<String, Value>;
        /// Cloud properties of disks that a request does not give.
        disk_defaults: Map<String, Value>;
    }
}

document! {
    /// How QEMU is run.
    pub struct Qemu {
        /// The emulator.
        binary: PathBuf = "/usr/bin/qemu-system-x86_64".into();
        /// The image tool.
        img_binary: PathBuf = "/usr/bin/qemu-img".into();
        /// `auto` takes KVM if a probe VM starts under it, and TCG with a warning otherwise.
        accel: AccelChoice = AccelChoice::Auto;
        /// CPU model as QEMU names it. Absent: `host` under KVM (or what the probe found to work), `max` under TCG.
        cpu: Option<String>;
        /// `auto` has QEMU use io_uring where the kernel and QEMU can; `off` for hosts that do not want it used.
        io_uring: IoUring = IoUring::Auto;
        /// Machine template for VMs that do not name one.
        template: String = "q35".into();
        /// A directory whose `<name>.toml` files come before the built-in templates.
        templates_dir: Option<PathBuf>;
        /// Empty hot-plug slots a VM starts with: the most persistent disks it can have at once.
        hotplug_slots: Whole<0, 128> = Whole::of(16);
    }
}

document! {
    /// A network of this host that VMs can be put on.
    pub struct Network {
        /// How the network reaches the world: a network profile. Built in are `nat`, `routed`, `isolated`, `bridge`, `vlan`
        /// and `user`; `docs/networking.md` draws each.
        profile: String = "nat".into();
        /// The bridge. Absent: the profile's; `bridge` has none and wants one that exists.
        bridge: Option<LinkName>;
        /// `vlan`: the link whose VLAN it is, instead of a bridge that tells VLANs apart.
        uplink: Option<LinkName>;
        /// `vlan`: which one. Absent: the request's.
        vlan: Option<VlanId>;
        /// Addresses of a network with a gateway of ours, as `10.0.0.0/24`. Absent: taken from each request's netmask.
        subnet: Option<IpNetwork>;
        /// The host's address in the subnet. Absent: the request's gateway.
        gateway: Option<std::net::IpAddr>;
        /// Addresses for networks of type `dynamic`, first and last: `10.0.0.100-10.0.0.199`. Absent: those of `subnet`.
        pool: Option<AddressRange>;
        /// Whether VMs may send only as themselves: from their own MAC and addresses.
        anti_spoof: bool = true;
        /// Whether a new VM's addresses are first looked for on the wire, by ARP and neighbour discovery. Absent: where
        /// other machines than VMs of this host can have them: on an operator's bridge and on VLANs.
        conflict_probe: Option<bool>;
        /// Ports of the host itself that VMs on a bridge of ours may use, as `tcp/22`. They may always ping it.
        host_services: Vec<HostPort>;
        /// Largest packet, bytes. Absent: that of the link to the world for bridges of ours, the bridge's for others.
        mtu: Option<Mtu>;
    }
}

/// A VLAN's number.
pub type VlanId = Whole<1, 4094>;
/// The size of the largest packet, bytes.
pub type Mtu = Whole<576, 65535>;

document! {
    /// What a security group admits.
    pub struct GroupRule {
        /// `all` is every protocol of IP, `icmp` is ICMP and ICMPv6.
        protocol: IpProtocol;
        /// One port or a range, as `"8000-8010"`. Absent: all. Only with `tcp`, `udp` and `sctp`.
        ports: Option<PortRange>;
        /// From where. Absent: from anywhere.
        source: Option<IpNetwork>;
    }
}

document! {
    /// A directory for images.
    pub struct Pool {
        /// The directory. It must exist: what is not mounted must not fill the filesystem below.
        path: PathBuf;
        /// Whether other hosts use the filesystem, too (NFS). It must then be another than the state directory's and `/`.
        shared: bool = false;
    }
}

document! {
    /// What every agent is told unless the Director's env says otherwise.
    pub struct Agent {
        /// Message bus: `nats://…` for a Director's VMs, `https://user:password@0.0.0.0:6868` for create-env.
        mbus: Redacted<Option<String>>;
        /// Time servers.
        ntp: Vec<String>;
        /// Blobstore, as the agent's settings want it: `{"provider": …, "options": {…}}`.
        blobstore: Redacted<Map<String, Value>>;
    }
}

document! {
    /// How much this host does at once.
    pub struct Limits {
        /// VMs that start at the same time, whoever starts them; others wait their turn. Absent: one for each CPU.
        parallel_boots: Option<Whole<1, 512>>;
        /// Whether memory that running VMs were promised and have not touched yet is kept for them.
        memory: Memory = Memory::Guaranteed;
        /// Memory that VMs do not get, MiB: for the host's own programs and its page cache.
        memory_reserve_mib: Whole<0, 1048576> = Whole::of(512);
    }
}

document! {
    /// What is written to standard error.
    pub struct Log {
        /// The least severe level that is written.
        level: LogLevel = LogLevel::Info;
        /// One line of text or one JSON object for each event.
        format: LogFormat = LogFormat::Text;
    }
}

choice! {
    /// Which accelerator to use.
    pub enum AccelChoice ("\"auto\", \"kvm\" or \"tcg\"") {
        /// KVM where a probe VM starts under it.
        Auto = "auto",
        /// KVM or an error.
        Kvm = "kvm",
        /// Emulation.
        Tcg = "tcg",
    }
}

choice! {
    /// Whether QEMU may use io_uring for its images.
    pub enum IoUring ("\"auto\" or \"off\"") {
        /// Where the kernel allows it and QEMU takes it.
        Auto = "auto",
        /// Linux AIO, or threads for images that are in the page cache.
        Off = "off",
    }
}

choice! {
    /// Whose memory is counted when a VM wants to start.
    pub enum Memory ("\"guaranteed\" or \"overcommit\"") {
        /// What is available, less what running VMs may still come to need.
        Guaranteed = "guaranteed",
        /// What is available now. For labs whose VMs are promised more than the host has.
        Overcommit = "overcommit",
    }
}

choice! {
    /// Whether a crashed VM is started again.
    pub enum Restart ("\"on-crash\" or \"never\"") {
        /// With back-off, at most 3 times in 10 minutes.
        OnCrash = "on-crash",
        /// Left to the Director's resurrector.
        Never = "never",
    }
}

choice! {
    /// How much confinement of QEMU may be missing.
    pub enum Hardening ("\"strict\", \"best-effort\" or \"off\"") {
        /// None: a step the host can not do fails the start.
        Strict = "strict",
        /// What the host can not do is left out and logged.
        BestEffort = "best-effort",
        /// QEMU runs as root, unconfined. For debugging.
        Off = "off",
    }
}

choice! {
    /// Severity of log events.
    pub enum LogLevel ("\"error\", \"warn\", \"info\", \"debug\" or \"trace\"") {
        /// A call failed.
        Error = "error",
        /// Something works, but not as well as asked.
        Warn = "warn",
        /// What was done, a few lines a call.
        Info = "info",
        /// Every step.
        Debug = "debug",
        /// Every message to QEMU and the kernel.
        Trace = "trace",
    }
}

choice! {
    /// Shape of log events.
    pub enum LogFormat ("\"text\" or \"json\"") {
        /// One line.
        Text = "text",
        /// One JSON object.
        Json = "json",
    }
}

impl Network {
    /// The network that serves without any configuration.
    pub fn nat() -> Self {
        Self::absent().expect("every key of a network has a default")
    }
}

impl Config {
    /// What the types alone do not say.
    fn validated(self) -> Result<Self, SchemaError> {
        let longest = self.run_dir.as_os_str().len();
        if longest > 40 {
            let problem = crate::schema::Problem::Value {
                expected: "a path of at most 40 bytes",
                found: format!("{longest} bytes"),
            };
            return Err(SchemaError { path: "run_dir".into(), problem });
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
        if let Some(name) =
            self.pools.keys().find(|name| name.is_empty() || !name.chars().all(plain))
        {
            let expected = "a name of letters, digits, '-' and '_'";
            return Err(SchemaError::value(expected, &Value::String(name.clone())).under("pools"));
        }
        let unknown = self.stemcell_pool.as_ref().filter(|name| !self.pools.contains_key(*name));
        if let Some(name) = unknown {
            let expected = "the name of one of 'pools'";
            return Err(
                SchemaError::value(expected, &Value::String(name.clone())).under("stemcell_pool")
            );
        }
        self.transport.validated().map_err(|e| e.under("transport"))?;
        for (at, host) in self.hosts.iter().enumerate() {
            let path = |e: SchemaError| e.under(&at.to_string()).under("hosts");
            host.transport.validated().map_err(|e| path(e.under("transport")))?;
            if host.transport.kind == TransportKind::Local {
                let (expected, found) =
                    ("\"ssh\", or \"unix\" for this machine", "\"local\"".to_owned());
                let problem = crate::schema::Problem::Value { expected, found };
                return Err(path(SchemaError { path: "transport.kind".into(), problem }));
            }
            if self.hosts[..at].iter().any(|other| other.name == host.name) {
                let found = "one that another host has".to_owned();
                let problem =
                    crate::schema::Problem::Value { expected: "a name of its own", found };
                return Err(path(SchemaError { path: "name".into(), problem }));
            }
        }
        for (name, rules) in &self.security_groups {
            if let Some(at) =
                rules.iter().position(|rule| rule.ports.is_some() && !rule.protocol.has_ports())
            {
                let problem = crate::schema::Problem::Value {
                    expected: "ports only with \"tcp\", \"udp\" or \"sctp\"",
                    found: "ports of another protocol".into(),
                };
                return Err(SchemaError {
                    path: format!("security_groups.{name}.{at}.ports"),
                    problem,
                });
            }
        }
        Ok(self)
    }

    /// How long `method` may take; `default` unless the operator decided.
    pub fn deadline(&self, method: &str, default: Duration) -> Duration {
        self.deadlines.get(method).map_or(default, |seconds| Duration::from_secs(seconds.get()))
    }
}

impl Property for IpNetwork {
    const EXPECTED: &'static str = "a subnet such as \"10.0.0.0/24\"";

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let network = value.as_str().and_then(|text| text.parse::<IpNetwork>().ok());
        network
            .filter(|n| n.ip() == n.network())
            .ok_or_else(|| SchemaError::value(Self::EXPECTED, value))
    }
}

impl Property for std::net::IpAddr {
    const EXPECTED: &'static str = "an IP address";

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
    fn nothing_at_all_is_a_configuration() {
        let config = Config::from_json(&json!({})).unwrap();
        assert_eq!(config.networks["default"].profile, "nat");
        assert_eq!(config.qemu.hotplug_slots.get(), 16);
    }

    #[test]
    fn the_path_of_a_bad_key_is_named() {
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
            "networks.a.subnet: expected a subnet such as \"10.0.0.0/24\", got a string"
        );
    }

    #[test]
    fn ports_are_of_protocols_that_have_some() {
        let group = |rule: Value| {
            let config = Config::from_json(&json!({"security_groups": {"web": [rule]}}))
                .and_then(Config::validated);
            config.map(drop).map_err(|error| error.to_string())
        };
        for protocol in [json!("tcp"), json!(17), json!("sctp")] {
            assert_eq!(group(json!({"protocol": protocol, "ports": 80})), Ok(()));
        }
        let refused = Err("security_groups.web.0.ports: expected ports only with \"tcp\", \"udp\" or \"sctp\", got \
                           ports of another protocol"
            .to_owned());
        for protocol in [json!("icmp"), json!("vrrp"), json!("all")] {
            assert_eq!(group(json!({"protocol": protocol})), Ok(()));
            assert_eq!(group(json!({"protocol": protocol, "ports": 80})), refused);
        }
    }

    #[test]
    fn hosts_have_names_of_their_own() {
        let unix = json!({"kind": "unix"});
        let twice =
            json!({"hosts": [{"name": "a", "transport": unix}, {"name": "a", "transport": unix}]});
        let error = Config::from_json(&twice).and_then(Config::validated).unwrap_err();
        assert_eq!(
            error.to_string(),
            "hosts.1.name: expected a name of its own, got one that another host has"
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
