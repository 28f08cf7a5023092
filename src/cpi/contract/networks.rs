//! The networks argument of `create_vm`, and the same networks in the answer.
//!
//! The typed values stand beside the text as received: the agent and the answer get every key,
//! known or not, in its order. What the host makes of a network (bridge, tap, addresses of a pool)
//! is decided in [`crate::cpi::network`].
//!
//! Facts: Director 283 `deployment_plan/{manual,dynamic,vip}_network.rb`, bosh-cli 7.10
//! `manifest/network.go`.

use crate::choice;
use crate::ordered::Object;
use crate::schema::{Expected, Problem, Property, Redacted, SchemaError, check_key, printable};
use ipnetwork::IpNetwork;
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use std::net::IpAddr;

/// Networks in the manifest's order.
#[derive(Debug, Clone)]
pub struct Networks(Vec<NetworkSpec>);

/// One network of a VM.
#[derive(Debug, Clone)]
pub struct NetworkSpec {
    /// Its name in the manifest.
    pub name: String,
    /// Where its addresses come from.
    pub addressing: Addressing,
    /// Name servers for the guest.
    pub dns: Vec<IpAddr>,
    /// What the network is the default for: `dns`, `gateway`, `addressable`.
    pub default: Vec<String>,
    /// Networks with the same group share one NIC.
    pub nic_group: Option<String>,
    /// Cloud properties of the subnet.
    pub cloud_properties: Redacted<Map<String, Value>>,
    /// Whether a dynamic network has been given its address.
    resolved: bool,
    received: Object,
}

/// Where a network's addresses come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Addressing {
    /// From the Director.
    Manual {
        /// The VM's address, with the length of its subnet's netmask.
        address: IpNetwork,
        /// The subnet's router, if there is one.
        gateway: Option<IpAddr>,
        /// Prefix length of the VM's own block, which begins at `address`: 32 or 128 is one
        /// address. The Director sends it, bosh-cli does not.
        prefix: Option<u8>,
    },
    /// From this CPI.
    Dynamic {
        /// The address that the instance had before; preferred if it is free.
        previous: Option<IpAddr>,
    },
    /// From the Director, translated outside the guest.
    Vip {
        /// The address.
        ip: IpAddr,
    },
}

choice! {
    /// The type of a network, for an [`Addressing`].
    pub enum Kind ("\"manual\", \"dynamic\" or \"vip\"") {
        /// [`Addressing::Manual`].
        Manual = "manual",
        /// [`Addressing::Dynamic`].
        Dynamic = "dynamic",
        /// [`Addressing::Vip`].
        Vip = "vip",
    }
}

impl Networks {
    /// Reads the argument: an object of networks by name.
    ///
    /// # Errors
    /// Names `<network>.<key>`.
    pub fn from_json(text: &RawValue) -> Result<Self, SchemaError> {
        let networks = object(text)?;
        let spec = |(name, text)| {
            check_key(name)?;
            NetworkSpec::from_json(name, text).map_err(|e| e.under(&printable(name)))
        };
        networks.iter().map(spec).collect::<Result<_, _>>().map(Self)
    }

    /// The networks, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &NetworkSpec> {
        self.0.iter()
    }

    /// The networks, in order, to complete with [`NetworkSpec::set`].
    pub fn iter_mut(&mut self) -> impl ExactSizeIterator<Item = &mut NetworkSpec> {
        self.0.iter_mut()
    }
}

impl Networks {
    /// The networks for the agent. Addresses that this CPI has chosen are `manual` there: for
    /// `dynamic` the agent uses DHCP.
    #[must_use]
    pub fn for_agent(&self) -> Self {
        let mut networks = self.clone();
        for network in networks.0.iter_mut().filter(|network| network.resolved) {
            network.received.set("type", Kind::Manual.as_str());
        }
        networks
    }
}

/// Everything received and [`set`](NetworkSpec::set), in the order received.
impl Serialize for Networks {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for network in &self.0 {
            map.serialize_entry(&network.name, &network.received)?;
        }
        map.end()
    }
}

impl NetworkSpec {
    fn from_json(name: &str, text: &RawValue) -> Result<Self, SchemaError> {
        let received = object(text)?;
        received.iter().try_for_each(|(key, _)| check_key(key))?;
        let addressing = match required(&received, "type")? {
            Kind::Manual => manual(&received)?,
            Kind::Dynamic => Addressing::Dynamic { previous: optional(&received, "ip")? },
            Kind::Vip => Addressing::Vip { ip: required::<HostAddress>(&received, "ip")?.0 },
        };
        Ok(Self {
            name: name.to_owned(),
            addressing,
            dns: optional(&received, "dns")?.unwrap_or_default(),
            default: optional(&received, "default")?.unwrap_or_default(),
            nic_group: optional(&received, "nic_group")?,
            cloud_properties: optional(&received, "cloud_properties")?.unwrap_or_default(),
            resolved: false,
            received,
        })
    }

    /// Gives a dynamic network the address of the VM, with its subnet's prefix, and the subnet's
    /// router.
    pub fn resolve(&mut self, address: IpNetwork, gateway: Option<IpAddr>) {
        self.set("ip", &address.ip().to_string());
        self.set("netmask", &address.mask().to_string());
        if let Some(gateway) = gateway {
            self.set("gateway", &gateway.to_string());
        }
        self.resolved = true;
    }

    /// Sets a value that was chosen here, in the answer and the agent's settings: `mac`, the `ip`
    /// of a dynamic network.
    pub fn set(&mut self, key: &str, value: &str) {
        self.received.set(key, value);
    }
}

fn manual(received: &Object) -> Result<Addressing, SchemaError> {
    let HostAddress(ip) = required(received, "ip")?;
    let same_family = |other: &IpAddr| other.is_ipv4() == ip.is_ipv4();

    let netmask: IpAddr = required(received, "netmask")?;
    let length = ipnetwork::ip_mask_to_prefix(netmask).ok().filter(|_| same_family(&netmask));
    let address = length.and_then(|length| IpNetwork::new(ip, length).ok());
    let address = address
        .ok_or_else(|| problem("netmask", "a netmask of the family of 'ip'", "another address"))?;

    let gateway = optional::<HostAddress>(received, "gateway")?.map(|gateway| gateway.0);
    if gateway.is_some_and(|gateway| !same_family(&gateway)) {
        return Err(problem(
            "gateway",
            "an address of the family of 'ip'",
            "one of the other family",
        ));
    }

    let prefix = optional::<PrefixLength>(received, "prefix")?.map(|prefix| prefix.0);
    if prefix.is_some_and(|prefix| ip.is_ipv4() && prefix > 32) {
        return Err(problem("prefix", "a string \"0\" to \"32\" for IPv4", "a larger one"));
    }
    check_block(address, gateway, prefix)?;
    Ok(Addressing::Manual { address, gateway, prefix })
}

/// Checks that the VM's block lies in its subnet and contains neither the router nor the subnet's
/// first and last address: the guest may send from every address of the block.
fn check_block(
    address: IpNetwork,
    gateway: Option<IpAddr>,
    prefix: Option<u8>,
) -> Result<(), SchemaError> {
    let (ip, width) = (address.ip(), if address.is_ipv4() { 32 } else { 128 });
    let block = IpNetwork::new(ip, prefix.unwrap_or(width).min(width))
        .expect("not longer than its family's addresses");
    if block.prefix() < address.prefix() {
        return Err(problem("prefix", "a block of the subnet that 'netmask' says", "a wider one"));
    }
    if gateway.is_some_and(|gateway| block.contains(gateway)) {
        return Err(problem(
            "gateway",
            "an address that is not the VM's own",
            "one of 'ip' and 'prefix'",
        ));
    }
    // In a subnet of one or two addresses, each is one of a host (RFC 3021, RFC 6164).
    let is_last = ip.is_ipv4() && ip == address.broadcast();
    if address.prefix() + 1 < width
        && block.prefix() > address.prefix()
        && (ip == address.network() || is_last)
    {
        return Err(problem("ip", "an address of a host", "the subnet's first or last"));
    }
    Ok(())
}

/// An address that a machine can have.
#[derive(serde::Serialize)]
struct HostAddress(IpAddr);

impl Property for HostAddress {
    const EXPECTED: Expected = Expected::address("an IP address of a host");

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let ip = IpAddr::from_json(value)?;
        let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
        if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || broadcast {
            return Err(SchemaError::value(Self::EXPECTED, value));
        }
        Ok(Self(ip))
    }
}

/// A prefix length, which the Director sends as a string.
#[derive(serde::Serialize)]
struct PrefixLength(u8);

impl Property for PrefixLength {
    const EXPECTED: Expected = Expected::number("a string \"0\" to \"128\"");

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let length =
            value.as_str().and_then(|text| text.parse().ok()).filter(|length| *length <= 128);
        length.map(Self).ok_or_else(|| SchemaError::value(Self::EXPECTED, value))
    }
}

fn object(text: &RawValue) -> Result<Object, SchemaError> {
    serde_json::from_str(text.get()).map_err(|_| SchemaError::value("an object", &parsed(text)))
}

/// The value of a text that was parsed when the request was read.
fn parsed(text: &RawValue) -> Value {
    serde_json::from_str(text.get()).unwrap_or_default()
}

/// The value at `key`; null counts as absent.
fn optional<T: Property>(object: &Object, key: &str) -> Result<Option<T>, SchemaError> {
    object
        .get(key)
        .map_or(Ok(None), |text| Option::from_json(&parsed(text)).map_err(|e| e.under(key)))
}

fn required<T: Property>(object: &Object, key: &str) -> Result<T, SchemaError> {
    let missing = || SchemaError { path: key.to_owned(), problem: Problem::Missing(T::EXPECTED) };
    optional(object, key)?.ok_or_else(missing)
}

fn problem(key: &str, expected: &'static str, found: &str) -> SchemaError {
    SchemaError {
        path: key.to_owned(),
        problem: Problem::Value { expected, found: found.to_owned() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks(text: &str) -> Result<Networks, SchemaError> {
        Networks::from_json(&RawValue::from_string(text.to_owned()).unwrap())
    }

    fn one(text: &str) -> NetworkSpec {
        networks(&format!(r#"{{"a":{text}}}"#)).unwrap().0.remove(0)
    }

    fn refusal(text: &str) -> String {
        networks(&format!(r#"{{"a":{text}}}"#)).unwrap_err().in_request("networks").report()
    }

    #[test]
    fn a_directors_manual_network() {
        let network = one(
            r#"{"type":"manual","ip":"10.245.0.3","prefix":"32","netmask":"255.255.255.0","cloud_properties":{"bridge":"br0"},
               "default":["dns","gateway"],"dns":["8.8.8.8"],"gateway":"10.245.0.1"}"#,
        );
        let address = "10.245.0.3/24".parse().unwrap();
        let gateway = "10.245.0.1".parse().ok();
        assert_eq!(network.addressing, Addressing::Manual { address, gateway, prefix: Some(32) });
        assert_eq!(network.default, ["dns", "gateway"]);
        assert_eq!(network.dns, ["8.8.8.8".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn ipv6_in_the_directors_long_form() {
        let network = one(
            r#"{"type":"manual","ip":"fd00::5","prefix":"80","netmask":"ffff:ffff:ffff:ffff:0000:0000:0000:0000",
               "nic_group":"1","gateway":null,"cloud_properties":null}"#,
        );
        let address = "fd00::5/64".parse().unwrap();
        assert_eq!(
            network.addressing,
            Addressing::Manual { address, gateway: None, prefix: Some(80) }
        );
        assert_eq!(network.nic_group.as_deref(), Some("1"));
    }

    #[test]
    fn dynamic_and_vip() {
        let dynamic = one(
            r#"{"type":"dynamic","cloud_properties":{"bridge":"br1"},"dns":["1.1.1.1"],"prefix":"32"}"#,
        );
        assert_eq!(dynamic.addressing, Addressing::Dynamic { previous: None });
        let again = one(r#"{"type":"dynamic","ip":"10.0.0.9","netmask":"255.0.0.0"}"#);
        assert_eq!(again.addressing, Addressing::Dynamic { previous: "10.0.0.9".parse().ok() });
        let vip = one(r#"{"type":"vip","ip":"198.51.100.7","cloud_properties":{"pool":"p"}}"#);
        assert_eq!(vip.addressing, Addressing::Vip { ip: "198.51.100.7".parse().unwrap() });
    }

    #[test]
    fn everything_goes_back_in_the_order_it_came_with_the_mac() {
        let text = r#"{"z":{"type":"dynamic","unknown":[1.0,null],"cloud_properties":{"b":1,"a":2}},"a":{"type":"dynamic"}}"#;
        let mut received = networks(text).unwrap();
        assert_eq!(serde_json::to_string(&received).unwrap(), text);
        assert_eq!(
            received.iter().map(|network| network.name.as_str()).collect::<Vec<_>>(),
            ["z", "a"]
        );
        for network in received.iter_mut() {
            network.set("mac", "52:54:00:aa:bb:cc");
        }
        let answered = text.replace("2}}", r#"2},"mac":"52:54:00:aa:bb:cc"}"#);
        let answered = answered.replace(r#"dynamic"}}"#, r#"dynamic","mac":"52:54:00:aa:bb:cc"}}"#);
        assert_eq!(serde_json::to_string(&received).unwrap(), answered);
    }

    #[test]
    fn errors_name_the_network_and_the_key() {
        let manual =
            |rest: &str| refusal(&format!(r#"{{"type":"manual","ip":"10.0.0.2",{rest}}}"#));
        for (got, expected) in [
            (refusal("[]"), "networks.a: expected an object, got an array"),
            (refusal("{}"), r#"networks.a.type: missing; expected "manual", "dynamic" or "vip""#),
            (
                refusal(r#"{"type":"x"}"#),
                r#"networks.a.type: expected "manual", "dynamic" or "vip", got a string"#,
            ),
            (
                refusal(r#"{"type":"manual"}"#),
                "networks.a.ip: missing; expected an IP address of a host",
            ),
            (
                refusal(r#"{"type":"vip","ip":"0.0.0.0"}"#),
                r#"networks.a.ip: expected an IP address of a host, got "0.0.0.0""#,
            ),
            (manual(r#""dns":[]"#), "networks.a.netmask: missing; expected an IP address"),
            (
                manual(r#""netmask":"255.0.255.0""#),
                "networks.a.netmask: expected a netmask of the family of 'ip', got another address",
            ),
            (
                manual(r#""netmask":"ffff::""#),
                "networks.a.netmask: expected a netmask of the family of 'ip', got another address",
            ),
            (
                manual(r#""netmask":"255.0.0.0","gateway":"fd00::1""#),
                "networks.a.gateway: expected an address of the family of 'ip', got one of the other family",
            ),
            (
                manual(r#""netmask":"255.0.0.0","prefix":24"#),
                r#"networks.a.prefix: expected a string "0" to "128", got 24"#,
            ),
            (
                manual(r#""netmask":"255.0.0.0","prefix":"64""#),
                r#"networks.a.prefix: expected a string "0" to "32" for IPv4, got a larger one"#,
            ),
            (
                manual(r#""netmask":"255.255.0.0","prefix":"8""#),
                "networks.a.prefix: expected a block of the subnet that 'netmask' says, got a wider one",
            ),
            (
                manual(r#""netmask":"255.0.0.0","prefix":"30","gateway":"10.0.0.1""#),
                "networks.a.gateway: expected an address that is not the VM's own, got one of 'ip' and 'prefix'",
            ),
            (
                refusal(r#"{"type":"manual","ip":"10.0.0.255","netmask":"255.255.255.0"}"#),
                "networks.a.ip: expected an address of a host, got the subnet's first or last",
            ),
            (
                refusal(r#"{"type":"manual","ip":"10.0.0.0","netmask":"255.255.255.0"}"#),
                "networks.a.ip: expected an address of a host, got the subnet's first or last",
            ),
            (
                manual(r#""netmask":"255.0.0.0","dns":["8.8.8.8","x"]"#),
                "networks.a.dns.1: expected an IP address, got a string",
            ),
            (
                manual(r#""netmask":"255.0.0.0","nic_group":1"#),
                "networks.a.nic_group: expected a non-empty string, got 1",
            ),
        ] {
            assert_eq!(got, expected);
        }
    }

    #[test]
    fn a_hostile_name_is_cut_and_escaped() {
        let text = format!(r#"{{"\u001b[31m{}":1}}"#, "x".repeat(500));
        let error = networks(&text).unwrap_err().to_string();
        assert!(error.starts_with(r"\u{1b}[31mxxx") && error.len() < 150, "{error}");
    }
}
