//! The host's memory: how much is available, how much a process uses, and which process the OOM
//! killer prefers.

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::units::Bytes;

/// Returns the memory that a new workload can use without swapping: free memory and droppable
/// caches (`MemAvailable`, proc_meminfo(5)).
///
/// # Errors
/// [`ErrorKind::Host`] if `/proc/meminfo` does not have it.
pub fn available() -> Result<Bytes> {
    let path = Path::new("/proc/meminfo");
    let text = std::fs::read_to_string(path).at("read", path)?;
    kib(&text, "MemAvailable:")
        .ok_or_else(|| Error::new(ErrorKind::Host, "no MemAvailable in '/proc/meminfo'"))
}

/// Returns the anonymous and shared memory that a process has touched, which the kernel cannot
/// drop; 0 if the process has ended.
pub fn resident(pid: i32) -> Bytes {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let of = |key| kib(&text, key).map_or(0, Bytes::get);
    Bytes(of("RssAnon:") + of("RssShmem:"))
}

/// Returns the value of the line `key` in a kernel file. The kernel writes `kB` and means KiB.
fn kib(text: &str, key: &str) -> Option<Bytes> {
    let number =
        text.lines().find_map(|line| line.strip_prefix(key))?.trim().strip_suffix(" kB")?;
    number.parse::<u64>().ok().map(|kib| Bytes(kib << 10))
}

/// Sets `oom_score_adj` of process `pid`: from -1000 to 1000, the OOM killer prefers higher values
/// (proc_pid_oom_score_adj(5)). Children inherit it. A container's root may not lower it; then it
/// stays unchanged.
pub fn set_oom_score_adj(pid: i32, adjustment: i32) {
    let path = PathBuf::from(format!("/proc/{pid}/oom_score_adj"));
    if let Err(error) = std::fs::write(&path, adjustment.to_string()) {
        let path = path.display();
        tracing::debug!(%error, %path, adjustment, "cannot set the process's OOM score");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kib_reads_kernel_counts_as_kibibytes() {
        let text =
            "MemTotal:       24683828 kB\nMemAvailable:   23423104 kB\nHugePages_Total:       0\n";
        assert_eq!(kib(text, "MemAvailable:"), Some(Bytes(23_423_104 << 10)));
        assert_eq!(kib(text, "HugePages_Total:"), None);
        assert!(available().unwrap().get() > 0);
        assert!(resident(std::process::id() as i32).get() > 0);
        assert_eq!(resident(-1), Bytes(0));
    }
}
