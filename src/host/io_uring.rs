//! The io_uring probe: whether QEMU can use io_uring on this host.
//!
//! io_uring is the fastest of QEMU's three I/O engines, and opens an image without delay. Since
//! QEMU 9.2, an image with `aio=native` is first probed for `IO_CMD_FDSYNC`. That ends in
//! io_destroy(2) and so in two RCU grace periods: 30 ms for each disk.
//!
//! io_uring is not available everywhere. Kernels can be built without it, operators can disable it
//! (`kernel.io_uring_disabled`, Linux 6.6), containers can filter it, and QEMU can be built without
//! it. Where the kernel refuses it, QEMU 7.2 does not start, and QEMU 10 uses threads and prints a
//! warning. So this module asks the kernel first, then QEMU.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::probe::{identity, run_and_quit};
use super::uids;
use crate::config::{IoUring, Qemu};
use crate::error::{IoContext, Result};
use crate::store::atomic;
use crate::sys::io_uring;

/// Linux 6.6: 0 allows io_uring for all processes, 1 for privileged ones, which QEMU is not, 2 for
/// none.
const DISABLED_SYSCTL: &str = "/proc/sys/kernel/io_uring_disabled";
/// A uid outside the range of VMs.
const PROBE_UID: u32 = uids::FIRST + uids::COUNT;

/// How long the probe's QEMU may take. On timeout this call's disks work without io_uring.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// The result of a probe, with the QEMU binary that it is about.
#[derive(Debug, Serialize, Deserialize)]
struct Verdict {
    binary: PathBuf,
    identity: [u64; 4],
    works: bool,
}

/// Returns whether QEMU, run by an unprivileged user, can use io_uring. False until [`probe`] has
/// run.
pub fn is_usable(run_dir: &Path, qemu: &Qemu) -> bool {
    is_allowed(qemu) && cached_verdict(run_dir, &qemu.binary).unwrap_or(false)
}

/// Starts a throw-away QEMU with io_uring, unless the result for this binary is cached in
/// `io-uring.json` in the run directory. A failure is only logged, because VMs can start without
/// io_uring.
pub fn probe(run_dir: &Path, qemu: &Qemu, deadline: Instant) {
    if is_allowed(qemu)
        && cached_verdict(run_dir, &qemu.binary).is_none()
        && let Err(error) =
            probe_qemu(run_dir, &qemu.binary, deadline.min(Instant::now() + PROBE_TIMEOUT))
    {
        tracing::warn!(error = error.report(), "cannot probe whether QEMU can use io_uring");
    }
}

fn is_allowed(qemu: &Qemu) -> bool {
    // The file does not exist before Linux 6.6.
    let is_enabled =
        || std::fs::read_to_string(DISABLED_SYSCTL).map_or(true, |text| text.trim() == "0");
    qemu.io_uring == IoUring::Auto && is_enabled() && io_uring::is_allowed()
}

fn cached_verdict(run_dir: &Path, binary: &Path) -> Option<bool> {
    let text = std::fs::read(file(run_dir)).ok()?;
    let verdict: Verdict = serde_json::from_slice(&text).ok()?;
    let current = verdict.binary == binary && verdict.identity == identity(binary).ok()?;
    current.then_some(verdict.works)
}

fn probe_qemu(run_dir: &Path, binary: &Path, deadline: Instant) -> Result<()> {
    let identity = identity(binary)?;
    let verdict =
        Verdict { binary: binary.to_owned(), identity, works: can_start(binary, deadline)? };
    atomic::make_dir(run_dir)?;
    atomic::write(&file(run_dir), &serde_json::to_vec(&verdict).expect("a verdict is plain data"))
}

fn file(run_dir: &Path) -> PathBuf {
    run_dir.join("io-uring.json")
}

/// Starts QEMU without a machine. The image is QEMU's own binary, a file that every user can read.
fn can_start(binary: &Path, deadline: Instant) -> Result<bool> {
    let image = json!({
        "driver": "file",
        "node-name": "probe",
        "filename": binary,
        "read-only": true,
        "aio": "io_uring",
    });
    let mut child = Command::new(binary)
        .args([
            "-machine",
            "none",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-S",
            "-qmp",
            "stdio",
        ])
        .args(["-blockdev", &image.to_string()])
        .uid(PROBE_UID)
        .gid(PROBE_UID)
        .current_dir("/")
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .at("run", binary)?;
    Ok(run_and_quit(&mut child, binary, "", deadline)?.success())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::Property;

    fn qemu(binary: &str) -> Qemu {
        Qemu { binary: binary.into(), ..Qemu::absent().unwrap() }
    }

    #[test]
    fn probe_caches_the_verdict_for_one_binary() {
        let run = tempfile::tempdir().unwrap();
        let path = run.path().join("io-uring.json");
        let soon = || Instant::now() + Duration::from_secs(20);
        // /bin/true accepts every argument, /bin/false none.
        let (accepts, refuses) = (qemu("/bin/true"), qemu("/bin/false"));
        let off = Qemu { io_uring: IoUring::Off, ..accepts.clone() };
        probe(run.path(), &off, soon());
        assert!(!path.exists(), "the configuration turns it off, so no QEMU was started");
        probe(run.path(), &accepts, soon());
        if !is_allowed(&accepts) {
            assert!(!path.exists(), "the kernel refuses it, so no QEMU was started");
            return;
        }
        assert!(is_usable(run.path(), &accepts));
        assert!(!is_usable(run.path(), &off), "the configuration turns it off");
        assert!(!is_usable(run.path(), &refuses), "the verdict is about another binary");
        let cached = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, cached.replace("true}", "false}")).unwrap();
        probe(run.path(), &accepts, soon());
        assert!(!is_usable(run.path(), &accepts), "the same binary is not probed again");
        probe(run.path(), &refuses, soon());
        assert_eq!(cached_verdict(run.path(), &refuses.binary), Some(false));
        std::fs::write(&path, "half a verd").unwrap();
        probe(run.path(), &accepts, soon());
        assert!(is_usable(run.path(), &accepts));
        let none = qemu("/nonexistent");
        probe(run.path(), &none, soon());
        assert!(!is_usable(run.path(), &none));
    }
}
