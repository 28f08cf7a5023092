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

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{probe, uids};
use crate::error::{IoContext, Result};
use crate::store::atomic;
use crate::sys::io_uring;

/// Since Linux 6.6: 0 for everybody, 1 for the privileged, which QEMU is not, 2 for nobody.
const SWITCH: &str = "/proc/sys/kernel/io_uring_disabled";
/// A user that no VM's QEMU has.
const NOBODY: u32 = uids::FIRST + uids::COUNT;

/// Whether a QEMU takes it, and which.
#[derive(Debug, Serialize, Deserialize)]
struct Verdict {
    binary: PathBuf,
    identity: [u64; 4],
    works: bool,
}

/// Whether the QEMU `binary`, run by a user without privileges, can use io_uring. What a throw-away QEMU said to it is
/// kept in `io-uring.json` in the run directory.
///
/// # Errors
/// QEMU is missing, or the run directory can not be written.
pub fn works(run_dir: &Path, binary: &Path) -> Result<bool> {
    let switched_off = std::fs::read_to_string(SWITCH).is_ok_and(|text| text.trim() != "0");
    if switched_off || !io_uring::is_allowed() {
        return Ok(false);
    }
    let identity = probe::identity(binary)?;
    let path = run_dir.join("io-uring.json");
    let known = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Verdict>(&text).ok());
    if let Some(known) = known.filter(|known| known.binary == binary && known.identity == identity) {
        return Ok(known.works);
    }
    let verdict = Verdict { binary: binary.to_owned(), identity, works: is_taken(binary)? };
    atomic::make_dir(run_dir)?;
    atomic::write(&path, &serde_json::to_vec(&verdict).expect("a verdict is plain data"))?;
    Ok(verdict.works)
}

/// Starts QEMU without a machine, with itself as the image: a file that every user can read.
fn is_taken(binary: &Path) -> Result<bool> {
    let image =
        json!({"driver": "file", "node-name": "probe", "filename": binary, "read-only": true, "aio": "io_uring"});
    let mut child = Command::new(binary)
        .args(["-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S", "-qmp", "stdio"])
        .args(["-blockdev", &image.to_string()])
        .uid(NOBODY)
        .gid(NOBODY)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .at("run", binary)?;
    Ok(probe::quit(&mut child, binary, "")?.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_is_kept_for_one_binary() {
        let run = tempfile::tempdir().unwrap();
        let path = run.path().join("io-uring.json");
        // One that takes every argument, and one that takes none.
        let (takes, refuses) = (Path::new("/bin/true"), Path::new("/bin/false"));
        if !works(run.path(), takes).unwrap() {
            assert!(!path.exists(), "the kernel refuses, so no QEMU was asked");
            return;
        }
        assert!(!works(run.path(), refuses).unwrap());
        assert!(works(run.path(), takes).unwrap(), "another binary is asked");
        let kept = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, kept.replace("true}", "false}")).unwrap();
        assert!(!works(run.path(), takes).unwrap(), "the same is not asked again");
        std::fs::write(&path, "half a verd").unwrap();
        assert!(works(run.path(), takes).unwrap());
        assert!(works(run.path(), Path::new("/nonexistent")).is_err());
    }
}
