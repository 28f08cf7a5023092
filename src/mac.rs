//! MAC addresses. Each is derived from its owner's name, so a VM keeps its addresses over restarts
//! and no file stores them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::cid::VmCid;

/// An Ethernet address. Its text is lower case with colons: the agent compares it byte by byte with
/// `/sys/class/net/*/address` (bosh-agent `platform/net`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

/// The error for a text that is no MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a MAC address has six pairs of hexadecimal digits with colons between")]
pub struct MacAddressError;

/// Returns the address of NIC `index` of `vm`: `02:` and 40 bits of a hash of both.
///
/// `02` means locally administered, unicast (IEEE 802). The customary `52:54:00` leaves 24 bits:
/// with those, one in 34 networks of 1000 VMs has a collision; with 40 bits, one in two million.
pub fn mac_address(vm: &VmCid, index: usize) -> MacAddress {
    MacAddress::derived(0x02, "nic", &format!("{vm}\0{index}"))
}

impl MacAddress {
    /// Returns `first` and 40 bits derived from `owner`, which is unique among owners of that
    /// `kind`.
    pub(crate) fn derived(first: u8, kind: &str, owner: &str) -> Self {
        let hash = digest(kind, owner);
        Self([first, hash[0], hash[1], hash[2], hash[3], hash[4]])
    }

    /// The six bytes.
    pub fn octets(self) -> [u8; 6] {
        self.0
    }
}

/// Returns the hash behind every derived name and address. `kind` separates owners of different
/// kinds; neither text contains a newline.
pub(crate) fn digest(kind: &str, owner: &str) -> [u8; 32] {
    Sha256::digest(format!("{kind}\n{owner}")).into()
}

impl From<[u8; 6]> for MacAddress {
    fn from(octets: [u8; 6]) -> Self {
        Self(octets)
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddress {
    type Err = MacAddressError;
    fn from_str(text: &str) -> Result<Self, MacAddressError> {
        let mut octets = [0; 6];
        let mut pairs = text.split(':');
        for octet in &mut octets {
            let pair = pairs
                .next()
                .filter(|pair| pair.len() == 2 && pair.bytes().all(|b| b.is_ascii_hexdigit()));
            *octet =
                pair.and_then(|pair| u8::from_str_radix(pair, 16).ok()).ok_or(MacAddressError)?;
        }
        if pairs.next().is_none() { Ok(Self(octets)) } else { Err(MacAddressError) }
    }
}

impl TryFrom<String> for MacAddress {
    type Error = MacAddressError;
    fn try_from(text: String) -> Result<Self, MacAddressError> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> String {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cid::Cid;

    fn vm(text: &str) -> VmCid {
        VmCid::parse(text).unwrap()
    }

    #[test]
    fn a_vms_address_never_changes() {
        // Records and guests keep this text for years: it may never change.
        assert_eq!(mac_address(&vm("vm-a"), 0).to_string(), "02:b9:48:ba:57:d9");
    }

    #[test]
    fn cid_and_index_are_separate_in_the_hash() {
        assert_ne!(mac_address(&vm("vm-1"), 11), mac_address(&vm("vm-11"), 1));
        assert_ne!(mac_address(&vm("vm-1"), 0), mac_address(&vm("vm-1"), 1));
    }

    #[test]
    fn serde_uses_the_text() {
        let mac = mac_address(&vm("vm-a"), 3);
        let text = serde_json::to_string(&mac).unwrap();
        assert_eq!(text, format!("\"{mac}\""));
        assert_eq!(serde_json::from_str::<MacAddress>(&text).unwrap(), mac);
        for bad in
            ["", "02:00:00:00:00", "02:00:00:00:00:00:00", "2:0:0:0:0:0", "02:00:00:00:00:+1"]
        {
            assert_eq!(bad.parse::<MacAddress>(), Err(MacAddressError), "{bad:?}");
        }
    }
}
