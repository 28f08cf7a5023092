//! Sizes with their unit in the type. The CPI contract speaks MiB, images and QEMU speak bytes.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Mebibytes, the unit of every size in the CPI contract. At most [`MiB::MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MiB(u64);

impl MiB {
    /// The largest size taken from anybody: 64 TiB, a little under what qcow2 can hold with 64 KiB
    /// clusters.
    pub const MAX: MiB = MiB(64 * 1024 * 1024);

    /// `mib` mebibytes, or `None` above [`MiB::MAX`].
    pub const fn new(mib: u64) -> Option<Self> {
        if mib <= Self::MAX.0 { Some(Self(mib)) } else { None }
    }

    /// The smallest whole number of mebibytes that holds `bytes`, at most [`MiB::MAX`].
    pub const fn holding(bytes: Bytes) -> Option<Self> {
        Self::new(bytes.0.div_ceil(1 << 20))
    }

    /// The number of mebibytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The same size in bytes.
    pub const fn bytes(self) -> Bytes {
        Bytes(self.0 << 20)
    }
}

impl fmt::Display for MiB {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0)
    }
}

/// Bytes: the size of an image, an offset in it.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holding_rounds_up() {
        assert_eq!(MiB::holding(Bytes(1)), MiB::new(1));
        assert_eq!(MiB::holding(Bytes(1 << 20)), MiB::new(1));
        assert_eq!(MiB::holding(Bytes((1 << 20) + 1)), MiB::new(2));
    }

    #[test]
    fn the_absurd_is_refused() {
        assert_eq!(MiB::new(u64::MAX), None);
        assert_eq!(MiB::MAX.bytes().get(), 64 << 40);
    }
}
