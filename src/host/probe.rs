//! The accelerator probe: with which accelerator and CPU model the installed QEMU works on this
//! host.
//!
//! Opening `/dev/kvm` proves little. Under nested KVM, `-cpu host` can abort QEMU (QEMU 10.0, MSR
//! 0x10a), and QEMU's own `-accel kvm -accel tcg` does not fall back after an abort. So a
//! throw-away QEMU without a guest is started with each CPU model in turn. `probe.json` in the run
//! directory caches the first one that works for this binary. The result proves that vCPUs can be
//! made, not that every guest runs.

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::config::AccelChoice;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::store::atomic;
use crate::store::record::Accel;

/// The CPU models that are tried under KVM, the best first.
const KVM_MODELS: [&str; 3] = ["host", "host,arch-capabilities=off", "qemu64"];
/// The CPU model under TCG; every accelerator has it.
const TCG_MODEL: &str = "max";
/// How long the probe's QEMU may take: without a guest it answers in 0.1 s.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// The result of a probe, with the QEMU binary that it is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Verdict {
    binary: PathBuf,
    /// What [`identity`] returned: a changed binary is probed again.
    identity: [u64; 4],
    /// The best model that works under KVM, if any.
    kvm: Option<String>,
    /// Why KVM does not work.
    why_not: Option<String>,
}

/// Returns the accelerator and CPU model for a VM: `choice` and `model` where they are set, else
/// the result of the probe.
///
/// # Errors
/// [`ErrorKind::Host`] if `choice` is KVM and KVM does not work, or if QEMU is missing.
pub fn accelerator(
    run_dir: &Path,
    binary: &Path,
    choice: AccelChoice,
    model: Option<&str>,
) -> Result<(Accel, String)> {
    let tcg = || (Accel::Tcg, model.unwrap_or(TCG_MODEL).to_owned());
    if choice == AccelChoice::Tcg {
        return Ok(tcg());
    }
    let verdict = verdict(run_dir, binary)?;
    match (verdict.kvm, choice) {
        (Some(best), _) => Ok((Accel::Kvm, model.map_or(best, str::to_owned))),
        (None, AccelChoice::Kvm) => Err(Error::new(
            ErrorKind::Host,
            format!(
                "accel is \"kvm\", but KVM does not work on this host: {}",
                verdict.why_not.unwrap_or_default()
            ),
        )
        .hint(
            "load kvm_intel or kvm_amd, enable virtualization in the firmware, \
             or set `accel` (cloud properties) or `qemu.accel` (configuration) to tcg",
        )),
        (None, _) => {
            tracing::warn!(
                reason = verdict.why_not,
                "KVM does not work on this host: the guest is emulated and many times slower"
            );
            Ok(tcg())
        }
    }
}

fn verdict(run_dir: &Path, binary: &Path) -> Result<Verdict> {
    let identity = identity(binary)?;
    let path = run_dir.join("probe.json");
    let known =
        std::fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Verdict>(&text).ok());
    if let Some(known) = known.filter(|v| v.binary == binary && v.identity == identity) {
        return Ok(known);
    }
    let found = probe(binary);
    let verdict = Verdict {
        binary: binary.to_owned(),
        identity,
        kvm: found.as_ref().ok().map(|model| (*model).to_owned()),
        why_not: found.err().map(|error| error.report()),
    };
    // A negative result is not cached, because the KVM module may be loaded later.
    if verdict.kvm.is_some()
        && let Err(error) = write_cache(&verdict, &path)
    {
        tracing::warn!(
            error = error.report(),
            "cannot cache the accelerator probe: the next call repeats it"
        );
    }
    Ok(verdict)
}

fn write_cache(verdict: &Verdict, path: &Path) -> Result<()> {
    atomic::make_dir(path.parent().expect("a file in the run directory"))?;
    atomic::write(path, &serde_json::to_vec(verdict).expect("a verdict is plain data"))
}

/// Returns the identity of a binary: device, inode, size in bytes, modification time in seconds.
///
/// # Errors
/// If the binary cannot be found.
pub(super) fn identity(binary: &Path) -> Result<[u64; 4]> {
    let file = binary.metadata().at("find QEMU at", binary).map_err(|e| {
        e.hint("install qemu-system-x86 and qemu-utils, or set qemu.binary in the configuration")
    })?;
    Ok([file.dev(), file.ino(), file.len(), file.mtime().unsigned_abs()])
}

/// Returns the first CPU model with which QEMU starts under KVM.
fn probe(binary: &Path) -> Result<&'static str> {
    let device = Path::new("/dev/kvm");
    std::fs::OpenOptions::new().read(true).write(true).open(device).at("open", device)?;
    let mut last = None;
    for model in KVM_MODELS {
        match ensure_starts(binary, model) {
            Ok(()) => return Ok(model),
            Err(error) => last = Some(error),
        }
    }
    Err(last.expect("there are models to try"))
}

/// Checks that QEMU starts under KVM with `model`: starts it with `-S` and without a guest, and
/// ends it over its monitor.
fn ensure_starts(binary: &Path, model: &str) -> Result<()> {
    let mut child = Command::new(binary)
        .args([
            "-machine",
            "q35",
            "-accel",
            "kvm",
            "-cpu",
            model,
            "-m",
            "16M",
            "-nodefaults",
            "-no-user-config",
        ])
        .args(["-display", "none", "-S", "-qmp", "stdio"])
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .at("run", binary)?;
    let status = run_and_quit(
        &mut child,
        binary,
        "{\"execute\":\"query-kvm\"}",
        Instant::now() + PROBE_TIMEOUT,
    )?;
    let mut output = String::new();
    let _ = child.stdout.take().map(|stdout| stdout.take(64 * 1024).read_to_string(&mut output));
    if status.success() && output.contains("\"enabled\": true") {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Host,
        format!("QEMU with -accel kvm -cpu {model} ended with {status}"),
    ))
}

/// Has a QEMU with its monitor on standard input execute `commands` and quit, and returns its exit
/// status. At `deadline` QEMU is killed.
///
/// # Errors
/// [`ErrorKind::Timeout`] at `deadline`.
pub(super) fn run_and_quit(
    child: &mut Child,
    binary: &Path,
    commands: &str,
    deadline: Instant,
) -> Result<ExitStatus> {
    let script =
        format!("{{\"execute\":\"qmp_capabilities\"}}{commands}{{\"execute\":\"quit\"}}\n");
    // Fails with EPIPE if QEMU has aborted; its exit status says more.
    let _ = child.stdin.take().map(|mut stdin| stdin.write_all(script.as_bytes()));
    let process = crate::sys::pidfd::Process::open(child.id() as i32)?;
    let ended = process.wait_exit(deadline)?;
    if !ended {
        child.kill().at("end", binary)?;
    }
    let status = child.wait().at("wait for", binary)?;
    if ended {
        Ok(status)
    } else {
        Err(Error::new(
            ErrorKind::Timeout,
            format!("'{}' did not answer in time", binary.display()),
        ))
    }
}
