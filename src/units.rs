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

impl Bytes {
    /// The size with one decimal in the largest unit that fits: `512 MiB`, `7.5 GiB`, `1.8 TiB`.
    /// Rounds down, so that free space is never overstated.
    pub fn rounded(self) -> String {
        let mib = self.0 >> 20;
        let (unit, name) = match mib {
            0..1024 => return format!("{mib} MiB"),
            1024..1_048_576 => (1024, "GiB"),
            _ => (1_048_576, "TiB"),
        };
        let tenths = mib * 10 / unit;
        match tenths % 10 {
            0 => format!("{} {name}", tenths / 10),
            tenth => format!("{}.{tenth} {name}", tenths / 10),
        }
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

    #[test]
    fn sizes_are_in_the_largest_unit_that_fits_and_round_down() {
        let of_mib = |mib: u64| Bytes(mib << 20).rounded();
        assert_eq!(Bytes((1 << 20) - 1).rounded(), "0 MiB");
        assert_eq!(of_mib(1023), "1023 MiB");
        assert_eq!(of_mib(1024), "1 GiB");
        assert_eq!(of_mib(7_700), "7.5 GiB");
        assert_eq!(of_mib(1_048_575), "1023.9 GiB");
        assert_eq!(of_mib(1_900_000), "1.8 TiB");
        assert_eq!(of_mib(2_097_152), "2 TiB");
        assert_eq!(Bytes(u64::MAX).rounded(), "16777215.9 TiB");
    }
}
