//! Ranges as people write them: ports, addresses, a port with its protocol.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::choice;
use crate::schema::{Property, SchemaError};

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
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Tcp, Self::Udp];

    /// Its number in IP's header (IANA).
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

/// Ports, first and last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    /// First.
    pub first: u16,
    /// Last, not before the first.
    pub last: u16,
}

impl PortRange {
    /// How many ports there are.
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
    const EXPECTED: &'static str = "a port from 1 to 65535, or a range such as \"8000-8010\"";

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let text = value.as_str().map(str::to_owned).or_else(|| value.as_u64().map(|port| port.to_string()));
        text.and_then(|text| Self::parse(&text)).ok_or_else(|| SchemaError::value(Self::EXPECTED, value))
    }
}

impl Serialize for PortRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{}-{}", self.first, self.last))
    }
}

/// Addresses of one family, first and last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressRange {
    /// First.
    pub first: IpAddr,
    /// Last, not before the first.
    pub last: IpAddr,
}

impl AddressRange {
    /// From the first to the last.
    pub fn addresses(self) -> impl Iterator<Item = IpAddr> {
        let number = |ip| match ip {
            IpAddr::V4(ip) => u128::from(u32::from(ip)),
            IpAddr::V6(ip) => u128::from(ip),
        };
        let v4 = self.first.is_ipv4();
        (number(self.first)..=number(self.last)).map(move |number| {
            // The numbers are between those of two addresses of the family.
            if v4 { IpAddr::V4(Ipv4Addr::from(number as u32)) } else { IpAddr::V6(Ipv6Addr::from(number)) }
        })
    }
}

impl Property for AddressRange {
    const EXPECTED: &'static str = "two addresses such as \"10.0.0.100-10.0.0.199\"";

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let range = value.as_str().and_then(|text| {
            let (first, last) = text.split_once('-')?;
            Some(Self { first: first.trim().parse().ok()?, last: last.trim().parse().ok()? })
        });
        let fits = |range: &Self| range.first.is_ipv4() == range.last.is_ipv4() && range.first <= range.last;
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
    const EXPECTED: &'static str = "a protocol and a port such as \"tcp/22\"";

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let parsed = value.as_str().and_then(|text| {
            let (protocol, port) = text.split_once('/')?;
            let protocol = [Protocol::Tcp, Protocol::Udp].into_iter().find(|known| known.as_str() == protocol)?;
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
    fn what_people_write() {
        assert_eq!(PortRange::from_json(&json!(80)).unwrap(), PortRange { first: 80, last: 80 });
        assert_eq!(PortRange::from_json(&json!("80-90")).unwrap().count(), 11);
        assert!(HostPort::from_json(&json!("tcp/22")).is_ok());
        for bad in [json!(0), json!("90-80"), json!("a"), json!(65536), json!("1-2-3")] {
            assert!(PortRange::from_json(&bad).is_err(), "{bad}");
        }
        for bad in [json!("10.0.0.9-10.0.0.1"), json!("10.0.0.1-fd00::1"), json!("10.0.0.1")] {
            assert!(AddressRange::from_json(&bad).is_err(), "{bad}");
        }
        for bad in [json!("sctp/22"), json!("tcp/0"), json!("22")] {
            assert!(HostPort::from_json(&bad).is_err(), "{bad}");
        }
    }
}
