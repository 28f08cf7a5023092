//! The host's memory: what can be had, what a process has, and whom the kernel ends first when there is none.

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::units::Bytes;

/// What the kernel could give to a new workload without swapping: free memory and the caches it would drop
/// (`MemAvailable`, proc_meminfo(5)).
pub fn available() -> Result<Bytes> {
    let path = Path::new("/proc/meminfo");
    let text = std::fs::read_to_string(path).at("read", path)?;
    kib(&text, "MemAvailable:")
        .ok_or_else(|| Error::new(ErrorKind::Host, "no MemAvailable in '/proc/meminfo'"))
}

/// Memory of its own that a process has touched and that can not be dropped; none if it is gone.
pub fn resident(pid: i32) -> Bytes {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let of = |key| kib(&text, key).map_or(0, Bytes::get);
    Bytes(of("RssAnon:") + of("RssShmem:"))
}

/// The line `key` of a file of the kernel's that counts in kB, which are KiB.
fn kib(text: &str, key: &str) -> Option<Bytes> {
    let number =
        text.lines().find_map(|line| line.strip_prefix(key))?.trim().strip_suffix(" kB")?;
    number.parse::<u64>().ok().map(|kib| Bytes(kib << 10))
}

/// Tells the kernel how much rather than others it is to end process `pid` when the host is out of memory, from -1000 to
/// 1000 (`oom_score_adj`, proc_pid_oom_score_adj(5)). Children inherit it. A container's root may not lower it: then it stays.
pub fn set_oom_score_adj(pid: i32, adjustment: i32) {
    let path = PathBuf::from(format!("/proc/{pid}/oom_score_adj"));
    if let Err(error) = std::fs::write(&path, adjustment.to_string()) {
        tracing::debug!(%error, path = %path.display(), adjustment, "can not tell the kernel whom to spare");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_counts_are_kibibytes() {
        let text =
            "MemTotal:       24683828 kB\nMemAvailable:   23423104 kB\nHugePages_Total:       0\n";
        assert_eq!(kib(text, "MemAvailable:"), Some(Bytes(23_423_104 << 10)));
        assert_eq!(kib(text, "HugePages_Total:"), None);
        assert!(available().unwrap().get() > 0);
        assert!(resident(std::process::id() as i32).get() > 0);
        assert_eq!(resident(-1), Bytes(0));
    }
}
