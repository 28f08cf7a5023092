//! Tables and sizes as the operator reads them.

use crate::units::Bytes;

/// Formats `rows`, the first one the column heads, with every column as wide as its widest cell.
pub fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width =
        |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// A size with one decimal in the largest unit that fits: `512 MiB`, `7.5 GiB`, `1.8 TiB`.
/// Rounds down, so that free space is never overstated.
pub fn size(bytes: Bytes) -> String {
    let mib = bytes.get() >> 20;
    let unit = match mib {
        0..1024 => return format!("{mib} MiB"),
        1024..1_048_576 => (1024, "GiB"),
        _ => (1_048_576, "TiB"),
    };
    let tenths = mib * 10 / unit.0;
    match tenths % 10 {
        0 => format!("{} {}", tenths / 10, unit.1),
        tenth => format!("{}.{tenth} {}", tenths / 10, unit.1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_in_the_largest_unit_that_fits_and_round_down() {
        let of_mib = |mib: u64| size(Bytes(mib << 20));
        assert_eq!(size(Bytes((1 << 20) - 1)), "0 MiB");
        assert_eq!(of_mib(1023), "1023 MiB");
        assert_eq!(of_mib(1024), "1 GiB");
        assert_eq!(of_mib(7_700), "7.5 GiB");
        assert_eq!(of_mib(1_048_575), "1023.9 GiB");
        assert_eq!(of_mib(1_900_000), "1.8 TiB");
        assert_eq!(of_mib(2_097_152), "2 TiB");
        assert_eq!(size(Bytes(u64::MAX)), "16777215.9 TiB");
    }
}
