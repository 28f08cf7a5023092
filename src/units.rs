//! Sizes with their unit in the type: MiB in the CPI contract, bytes in images and QEMU.
//!
//! Messages show whole GiB as such: `20 GiB`, but `20481 MiB`.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Mebibytes, the unit of sizes in the CPI contract. At most [`MiB::MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MiB(u64);

impl MiB {
    /// The largest accepted size: 64 TiB, a little less than a qcow2 image with 64 KiB clusters can
    /// have.
    pub const MAX: MiB = MiB(64 * 1024 * 1024);

    /// `mib` mebibytes, or `None` above [`MiB::MAX`].
    pub const fn new(mib: u64) -> Option<Self> {
        if mib <= Self::MAX.0 { Some(Self(mib)) } else { None }
    }

    /// `bytes` rounded up to whole mebibytes, or `None` above [`MiB::MAX`].
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
        match self.0 {
            mib if mib > 0 && mib.is_multiple_of(1024) => write!(f, "{} GiB", mib / 1024),
            mib => write!(f, "{mib} MiB"),
        }
    }
}

/// Bytes: the size of an image, or an offset in it.
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
        match MiB::new(self.0 >> 20) {
            Some(whole) if whole.0 > 0 && whole.bytes() == *self => whole.fmt(f),
            _ => write!(f, "{} bytes", self.0),
        }
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
    fn a_size_is_shown_in_its_largest_whole_unit() {
        let shown = [0, 512, 1 << 20, 20 << 30, (20 << 30) + (1 << 20)].map(Bytes);
        assert_eq!(
            shown.map(|bytes| bytes.to_string()),
            ["0 bytes", "512 bytes", "1 MiB", "20 GiB", "20481 MiB"]
        );
        assert_eq!(MiB(0).to_string(), "0 MiB");
    }

    #[test]
    fn a_size_above_the_maximum_is_refused() {
        assert_eq!(MiB::new(u64::MAX), None);
        assert_eq!(MiB::MAX.bytes().get(), 64 << 40);
    }
}
