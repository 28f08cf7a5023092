//! Whether QEMU can use io_uring here.
//!
//! It is the fastest of QEMU's three ways to an image, and the one that is there at once: since QEMU 9.2 an image with
//! `aio=native` is first probed for `IO_CMD_FDSYNC`, which ends in io_destroy(2) and so in two RCU grace periods, 30 ms
//! for each disk. But kernels can be built without it, operators switch it off (`kernel.io_uring_disabled`, Linux 6.6),
//! containers filter it, and QEMUs lack it. Where the kernel refuses it, QEMU 7.2 does not start, and QEMU 10 goes on
//! with threads and a warning; so the kernel is asked before QEMU is.

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

/// Since Linux 6.6: 0 for everybody, 1 for the privileged, which QEMU is not, 2 for nobody.
const DISABLED_SYSCTL: &str = "/proc/sys/kernel/io_uring_disabled";
/// A user that no VM's QEMU has.
const PROBE_UID: u32 = uids::FIRST + uids::COUNT;

/// A QEMU that does not answer soon is not asked again in this call: its disks work without.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// Whether a QEMU takes it, and which.
#[derive(Debug, Serialize, Deserialize)]
struct Verdict {
    binary: PathBuf,
    identity: [u64; 4],
    works: bool,
}

/// Whether QEMU, run by a user without privileges, can and may use io_uring. False until it was [`probe`]d.
pub fn is_usable(run_dir: &Path, qemu: &Qemu) -> bool {
    is_allowed(qemu) && cached_verdict(run_dir, &qemu.binary).unwrap_or(false)
}

/// Finds out, unless the answer is there: a throw-away QEMU's is kept in `io-uring.json` in the run directory. That
/// this could not be done is no reason for a VM not to start.
pub fn probe(run_dir: &Path, qemu: &Qemu, deadline: Instant) {
    if is_allowed(qemu)
        && cached_verdict(run_dir, &qemu.binary).is_none()
        && let Err(error) =
            probe_qemu(run_dir, &qemu.binary, deadline.min(Instant::now() + PROBE_TIMEOUT))
    {
        tracing::warn!(error = error.report(), "it is not known whether QEMU can use io_uring");
    }
}

fn is_allowed(qemu: &Qemu) -> bool {
    // Without the file, the kernel is older than the switch.
    let switched_on =
        || std::fs::read_to_string(DISABLED_SYSCTL).map_or(true, |text| text.trim() == "0");
    qemu.io_uring == IoUring::Auto && switched_on() && io_uring::is_allowed()
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

/// Starts QEMU without a machine, with itself as the image: a file that every user can read.
fn can_start(binary: &Path, deadline: Instant) -> Result<bool> {
    let image = json!({"driver": "file", "node-name": "probe", "filename": binary, "read-only": true, "aio": "io_uring"});
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
    fn the_verdict_is_kept_for_one_binary() {
        let run = tempfile::tempdir().unwrap();
        let path = run.path().join("io-uring.json");
        let soon = || Instant::now() + Duration::from_secs(20);
        // One that takes every argument, and one that takes none.
        let (takes, refuses) = (qemu("/bin/true"), qemu("/bin/false"));
        let off = Qemu { io_uring: IoUring::Off, ..takes.clone() };
        probe(run.path(), &off, soon());
        assert!(!path.exists(), "it is not wanted, so no QEMU was asked");
        probe(run.path(), &takes, soon());
        if !is_allowed(&takes) {
            assert!(!path.exists(), "the kernel refuses, so no QEMU was asked");
            return;
        }
        assert!(is_usable(run.path(), &takes));
        assert!(!is_usable(run.path(), &off), "whatever works");
        assert!(!is_usable(run.path(), &refuses), "another binary was not asked");
        let kept = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, kept.replace("true}", "false}")).unwrap();
        probe(run.path(), &takes, soon());
        assert!(!is_usable(run.path(), &takes), "the same is not asked again");
        probe(run.path(), &refuses, soon());
        assert_eq!(cached_verdict(run.path(), &refuses.binary), Some(false));
        std::fs::write(&path, "half a verd").unwrap();
        probe(run.path(), &takes, soon());
        assert!(is_usable(run.path(), &takes));
        let none = qemu("/nonexistent");
        probe(run.path(), &none, soon());
        assert!(!is_usable(run.path(), &none));
    }
}
