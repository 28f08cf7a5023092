//! Protocols, ports and addresses as people write them, and ranges of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::choice;
use crate::schema::{Expected, Property, SchemaError};

choice! {
    /// A protocol with ports.
    pub enum Protocol ("\"tcp\" or \"udp\"") {
        /// TCP.
        Tcp = "tcp",
        /// UDP.
        Udp = "udp",
    }
}

impl Protocol {
    /// All protocols with ports.
    pub const ALL: [Self; 2] = [Self::Tcp, Self::Udp];

    /// Returns its number in the IP header (IANA).
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    /// Returns the protocol with this number.
    pub fn from_number(number: u8) -> Option<Self> {
        [Self::Tcp, Self::Udp].into_iter().find(|protocol| protocol.number() == number)
    }
}

/// One or several IP protocols.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IpProtocol {
    /// Every protocol.
    All,
    /// ICMP for IPv4, and ICMPv6 for IPv6.
    Icmp,
    /// The protocol with this number in the IP header (IANA).
    Number(u8),
}

/// Names of protocols (IANA's protocol numbers). All others have only numbers.
const PROTOCOLS: [(&str, u8); 11] = [
    ("tcp", 6),
    ("udp", 17),
    ("ah", 51),
    ("esp", 50),
    ("gre", 47),
    ("icmpv6", 58),
    ("igmp", 2),
    ("ipip", 4),
    ("ospf", 89),
    ("sctp", 132),
    ("vrrp", 112),
];

impl IpProtocol {
    /// Whether its header begins with two ports, as those of TCP, UDP and SCTP do (RFC 9293, RFC
    /// 768, RFC 9260).
    pub fn has_ports(self) -> bool {
        matches!(self, Self::Number(6 | 17 | 132))
    }

    /// Returns the first and last protocol number it stands for, for IPv4 or IPv6.
    pub fn numbers(self, v6: bool) -> (u8, u8) {
        match self {
            Self::All => (0, u8::MAX),
            Self::Icmp if v6 => (58, 58),
            Self::Icmp => (1, 1),
            Self::Number(number) => (number, number),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        match text {
            "all" => Some(Self::All),
            "icmp" => Some(Self::Icmp),
            text => {
                let named =
                    PROTOCOLS.iter().find(|(name, _)| *name == text).map(|(_, number)| *number);
                named.or_else(|| text.parse().ok()).map(Self::Number)
            }
        }
    }
}

impl Property for IpProtocol {
    const EXPECTED: Expected = Expected::text(
        "\"all\", \"tcp\", \"udp\", \"icmp\", \"icmpv6\", \"ah\", \
        \"esp\", \"gre\", \"igmp\", \"ipip\", \"ospf\", \"sctp\", \"vrrp\" \
        or a protocol's number from 0 to 255",
    );

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let parsed = match value {
            Value::String(text) => Self::parse(text),
            number => {
                number.as_u64().and_then(|number| u8::try_from(number).ok()).map(Self::Number)
            }
        };
        parsed.ok_or_else(|| SchemaError::value(Self::EXPECTED, value))
    }
}

impl Serialize for IpProtocol {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::All => serializer.serialize_str("all"),
            Self::Icmp => serializer.serialize_str("icmp"),
            Self::Number(number) => serializer.serialize_u8(*number),
        }
    }
}

/// A range of ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    /// The first.
    pub first: u16,
    /// The last, not before the first.
    pub last: u16,
}

impl PortRange {
    /// Returns the number of ports.
    pub fn count(self) -> u32 {
        u32::from(self.last - self.first) + 1
    }

    fn parse(text: &str) -> Option<Self> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let port = |text: &str| text.parse().ok().filter(|port| *port > 0);
        let (first, last) = (port(first)?, port(last)?);
        (first <= last).then_some(Self { first, last })
    }
}

impl Property for PortRange {
    const EXPECTED: Expected =
        Expected::number("a port from 1 to 65535, or a range such as \"8000-8010\"");

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let text = value
            .as_str()
            .map(str::to_owned)
            .or_else(|| value.as_u64().map(|port| port.to_string()));
        text.and_then(|text| Self::parse(&text))
            .ok_or_else(|| SchemaError::value(Self::EXPECTED, value))
    }
}

impl Serialize for PortRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{}-{}", self.first, self.last))
    }
}

/// A range of addresses of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressRange {
    /// The first.
    pub first: IpAddr,
    /// The last, not before the first.
    pub last: IpAddr,
}

impl AddressRange {
    /// Whether the range contains the address.
    pub fn contains(self, ip: IpAddr) -> bool {
        self.first.is_ipv4() == ip.is_ipv4() && self.first <= ip && ip <= self.last
    }

    /// Returns all addresses from the first to the last.
    pub fn addresses(self) -> impl Iterator<Item = IpAddr> {
        let number = |ip| match ip {
            IpAddr::V4(ip) => u128::from(u32::from(ip)),
            IpAddr::V6(ip) => u128::from(ip),
        };
        let v4 = self.first.is_ipv4();
        (number(self.first)..=number(self.last)).map(move |number| {
            // The numbers lie between those of two addresses of the family.
            if v4 {
                IpAddr::V4(Ipv4Addr::from(number as u32))
            } else {
                IpAddr::V6(Ipv6Addr::from(number))
            }
        })
    }
}

impl Property for AddressRange {
    const EXPECTED: Expected = Expected::address("two addresses such as \"10.0.0.100-10.0.0.199\"");

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let range = value.as_str().and_then(|text| {
            let (first, last) = text.split_once('-')?;
            Some(Self { first: first.trim().parse().ok()?, last: last.trim().parse().ok()? })
        });
        let fits = |range: &Self| {
            range.first.is_ipv4() == range.last.is_ipv4() && range.first <= range.last
        };
        range.filter(fits).ok_or_else(|| SchemaError::value(Self::EXPECTED, value))
    }
}

impl Serialize for AddressRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{}-{}", self.first, self.last))
    }
}

/// A port with its protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostPort {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The port.
    pub port: u16,
}

impl Property for HostPort {
    const EXPECTED: Expected = Expected::text("a protocol and a port such as \"tcp/22\"");

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let parsed = value.as_str().and_then(|text| {
            let (protocol, port) = text.split_once('/')?;
            let protocol = [Protocol::Tcp, Protocol::Udp]
                .into_iter()
                .find(|known| known.as_str() == protocol)?;
            Some(Self { protocol, port: port.parse().ok().filter(|port| *port > 0)? })
        });
        parsed.ok_or_else(|| SchemaError::value(Self::EXPECTED, value))
    }
}

impl Serialize for HostPort {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{}/{}", self.protocol, self.port))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ports_protocols_and_addresses_parse() {
        assert_eq!(PortRange::from_json(&json!(80)).unwrap(), PortRange { first: 80, last: 80 });
        assert_eq!(PortRange::from_json(&json!("80-90")).unwrap().count(), 11);
        assert!(HostPort::from_json(&json!("tcp/22")).is_ok());
        for bad in [json!(0), json!("90-80"), json!("a"), json!(65536), json!("1-2-3")] {
            assert!(PortRange::from_json(&bad).is_err(), "{bad}");
        }
        for bad in [json!("10.0.0.9-10.0.0.1"), json!("10.0.0.1-fd00::1"), json!("10.0.0.1")] {
            assert!(AddressRange::from_json(&bad).is_err(), "{bad}");
        }
        for (protocol, v4, v6) in [
            (json!("all"), (0, 255), (0, 255)),
            (json!("icmp"), (1, 1), (58, 58)),
            (json!("vrrp"), (112, 112), (112, 112)),
            (json!(89), (89, 89), (89, 89)),
            (json!("47"), (47, 47), (47, 47)),
        ] {
            let protocol = IpProtocol::from_json(&protocol).unwrap();
            assert_eq!((protocol.numbers(false), protocol.numbers(true)), (v4, v6));
            assert_eq!(
                IpProtocol::from_json(&json!(protocol)).unwrap(),
                protocol,
                "written and read again"
            );
        }
        for bad in [json!("vrp"), json!(256), json!(-1), json!("TCP"), json!(6.5)] {
            assert!(IpProtocol::from_json(&bad).is_err(), "{bad}");
        }
        for (name, _) in PROTOCOLS {
            assert!(IpProtocol::EXPECTED.words().contains(&format!("\"{name}\"")), "{name}");
        }
        for bad in [json!("sctp/22"), json!("tcp/0"), json!("22")] {
            assert!(HostPort::from_json(&bad).is_err(), "{bad}");
        }
    }
}
