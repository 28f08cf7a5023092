//! `bosh-qemu-cpi selftest`: checks in a few seconds, without a stemcell or a download, that this
//! host can run VMs.
//!
//! A 512-byte guest goes through the life of a VM, driven by the methods that a Director calls. It
//! prints `BOOTSECTOR-OK` when it boots, `U` when a disk is plugged, `D` when its unplug is
//! requested, and `OFF` at the power button (its source is in `guests/`). The test uses temporary
//! directories and its own network namespace. Of the configuration it checks that the host has its
//! pools, and the bridges and uplinks of its networks.

mod checks;
mod host;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;

use crate::commands::local;
use crate::config::{Config, Log, Qemu};
use crate::error::{Error, IoContext, Result};
use crate::schema::{Property, Whole};

/// The guest's boot sector.
const GUEST: &[u8; 512] = include_bytes!("../../../guests/acpi-bootsector.bin");

/// Prints one line for each check or, with `as_json`, one object. Returns true if all checks pass.
pub fn run(config: Option<&Path>, as_json: bool, output: &mut dyn Write) -> Result<bool> {
    local::ensure_root()?;
    let given = Config::load(config)?;
    // The selftest's own namespace has none of the host's links.
    let links = host::ensure_links(&given);
    let pools = host::ensure_pools(&given);
    let lab = Lab::new(given)?;
    let mut report = Report { as_json, lines: Vec::new(), output };
    let configured =
        report.check("pools", || pools).is_some() & report.check("networks", || links).is_some();
    let passed = checks::all(&lab, &mut report) && configured;
    report.finish(passed)?;
    Ok(passed)
}

/// A temporary host: its configuration and directories.
pub(super) struct Lab {
    config: Config,
    config_file: PathBuf,
    guest: PathBuf,
    /// Removed with everything in them when the lab is dropped.
    _dirs: [tempfile::TempDir; 2],
}

impl Lab {
    fn new(given: Config) -> Result<Self> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).map_err(|e| {
            Error::os("create a network namespace for the selftest", e)
                .hint("run it on the host itself, or in a container with CAP_SYS_ADMIN")
        })?;
        let state = tempfile::Builder::new()
            .prefix("bosh-qemu-cpi-")
            .tempdir()
            .map_err(|e| Error::os("create a temporary directory", e))?;
        let run = Path::new("/run");
        let run = tempfile::Builder::new()
            .prefix("bqc-")
            .tempdir_in(run)
            .at("create a directory in", run)?;
        let config = Config {
            state_dir: state.path().join("state"),
            run_dir: run.path().to_owned(),
            // Each slot costs boot time on a slow host, and one is enough.
            qemu: Qemu { hotplug_slots: Whole::of(1), ..given.qemu },
            log: Log::absent().expect("every key has a default"),
            networks: Config::from_json(&json!({})).map_err(|e| e.in_file("defaults"))?.networks,
            ..given
        };
        let lab = Self {
            config_file: state.path().join("cpi.json"),
            guest: state.path().join("guest.img"),
            config,
            _dirs: [state, run],
        };
        let text = serde_json::to_vec(&lab.config).expect("a configuration is plain data");
        std::fs::write(&lab.config_file, text).at("write", &lab.config_file)?;
        let mut disk = vec![0; 1 << 20];
        disk[..GUEST.len()].copy_from_slice(GUEST);
        std::fs::write(&lab.guest, disk).at("write", &lab.guest)?;
        Ok(lab)
    }
}

/// The outcomes of the checks, printed as they happen.
pub(super) struct Report<'a> {
    as_json: bool,
    lines: Vec<serde_json::Value>,
    output: &'a mut dyn Write,
}

impl Report<'_> {
    /// Runs one check and reports it. The check returns its value and a remark; the result is the
    /// value if it passed.
    pub(super) fn check<T>(
        &mut self,
        name: &str,
        check: impl FnOnce() -> Result<(T, String)>,
    ) -> Option<T> {
        let began = Instant::now();
        let outcome = check();
        let seconds = began.elapsed().as_secs_f64();
        let (passed, remark, value) = match outcome {
            Ok((value, remark)) => (true, remark, Some(value)),
            Err(error) => (false, error.report(), None),
        };
        if self.as_json {
            self.lines.push(
                json!({"check": name, "passed": passed, "seconds": seconds, "remark": remark}),
            );
        } else {
            let mark = if passed { "ok  " } else { "FAIL" };
            // A closed terminal does not change the outcome.
            let _ = writeln!(self.output, "{mark} {name:<14} {seconds:6.3} s  {remark}");
        }
        value
    }

    fn finish(self, passed: bool) -> Result<()> {
        let text = if self.as_json {
            json!({"passed": passed, "checks": self.lines}).to_string()
        } else if passed {
            "passed: this host can run VMs".to_owned()
        } else {
            "FAILED: not all checks pass".to_owned()
        };
        writeln!(self.output, "{text}").map_err(|e| Error::os("print the outcome", e))
    }
}
