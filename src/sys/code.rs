//! The memory pages of this program's own code.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MmapAdvise, madvise};

/// Releases the resident pages of code, for a process that waits for days after its start. The
/// kernel reads a page again from the page cache when it runs. Only the resident size changes, so
/// errors are ignored.
pub fn release_pages() {
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return };
    for (start, length) in maps.lines().filter_map(code_of_a_file) {
        // SAFETY: the mapping is private, file-backed and was never writable: the loader relocates
        // data, not code (proc(5)). So its pages equal the file's, and the kernel reads them again
        // at the next access (madvise(2)).
        let _ = unsafe { madvise(start, length, MmapAdvise::MADV_DONTNEED) };
    }
}

/// Parses a line of `/proc/<pid>/maps` and returns address and length in bytes if it is code of a
/// file.
fn code_of_a_file(line: &str) -> Option<(NonNull<c_void>, usize)> {
    let mut words = line.split_ascii_whitespace();
    let (range, permissions) = (words.next()?, words.next()?);
    let path = words.nth(3)?;
    if permissions != "r-xp" || !path.starts_with('/') {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let (start, end) =
        (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    Some((NonNull::without_provenance(NonZeroUsize::new(start)?), end.checked_sub(start)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_of_a_file_ignores_other_mappings() {
        let code = "7f3e88edc000-7f3e892ff000 r-xp 000db000 fe:00 5892114      /usr/bin/a program";
        let (start, length) = code_of_a_file(code).unwrap();
        assert_eq!((start.as_ptr() as usize, length), (0x7f3e_88ed_c000, 0x42_3000));
        for other in [
            "7f3e892ff000-7f3e89316000 r--p 004fd000 fe:00 5892114      /usr/bin/program",
            "7f3e89316000-7f3e8931a000 rwxp 00513000 fe:00 5892114      /usr/bin/program",
            "7f3e89397000-7f3e89399000 r-xp 00000000 00:00 0                          [vdso]",
            "7f3e8938f000-7f3e89391000 r-xp 00000000 00:00 0 ",
            "",
        ] {
            assert_eq!(code_of_a_file(other), None, "{other}");
        }
        release_pages();
    }
}
