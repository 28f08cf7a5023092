//! What the installed QEMU can do on this host: which accelerator and CPU model a VM starts with.
//!
//! That `/dev/kvm` opens says little: under nested KVM `-cpu host` can abort QEMU (QEMU 10.0, MSR 0x10a), and an abort is
//! nothing QEMU's own `-accel kvm -accel tcg` falls back from. So a throw-away QEMU without a guest is started with
//! each CPU model in turn. That one works is kept in `probe.json` in the run directory, for this binary. It says that vCPUs
//! can be made, not that every guest runs.

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

/// CPU models tried under KVM, the best first.
const KVM_MODELS: [&str; 3] = ["host", "host,arch-capabilities=off", "qemu64"];
/// The model that every accelerator has.
const TCG_MODEL: &str = "max";
/// A QEMU without a guest answers in 0.1 s; one that takes this long is as good as broken.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// What was found, and for which binary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Verdict {
    binary: PathBuf,
    /// Another binary is another verdict.
    identity: [u64; 4],
    /// The best model under KVM, if any.
    kvm: Option<String>,
    /// Why KVM can not be used.
    why_not: Option<String>,
}

/// The accelerator and CPU model for a VM: `choice` and `model` as far as they were asked for, the probe's verdict else.
///
/// # Errors
/// [`ErrorKind::Host`] if KVM was asked for and does not work, or QEMU is missing.
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
            format!("kvm was asked for but does not work here: {}", verdict.why_not.unwrap_or_default()),
        )
        .hint("load kvm_intel or kvm_amd, enable virtualization in the firmware, or set qemu.accel to tcg")),
        (None, _) => {
            tracing::warn!(
                reason = verdict.why_not,
                "kvm does not work here: the guest is emulated, many times slower"
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
    // That KVM does not work is asked again each time: the module may be loaded in a minute.
    if verdict.kvm.is_some()
        && let Err(error) = write_cache(&verdict, &path)
    {
        tracing::warn!(error = error.report(), "what QEMU can do here is asked again next time");
    }
    Ok(verdict)
}

fn write_cache(verdict: &Verdict, path: &Path) -> Result<()> {
    atomic::make_dir(path.parent().expect("a file in the run directory"))?;
    atomic::write(path, &serde_json::to_vec(verdict).expect("a verdict is plain data"))
}

/// What tells one QEMU from another: device, inode, size and modification time.
pub(super) fn identity(binary: &Path) -> Result<[u64; 4]> {
    let file = binary.metadata().at("find QEMU at", binary).map_err(|e| {
        e.hint("install qemu-system-x86 and qemu-utils, or set qemu.binary in the configuration")
    })?;
    Ok([file.dev(), file.ino(), file.len(), file.mtime().unsigned_abs()])
}

/// The first CPU model under which QEMU comes up with KVM.
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

/// Starts QEMU stopped, without a guest, and ends it by its own monitor.
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
    let mut said = String::new();
    let _ = child.stdout.take().map(|stdout| stdout.take(64 * 1024).read_to_string(&mut said));
    if status.success() && said.contains("\"enabled\": true") {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Host,
        format!("QEMU with -accel kvm -cpu {model} ended with {status}"),
    ))
}

/// Has a QEMU with its monitor on standard input do `commands` and end; how it ended. At `deadline` it is killed.
pub(super) fn run_and_quit(
    child: &mut Child,
    binary: &Path,
    commands: &str,
    deadline: Instant,
) -> Result<ExitStatus> {
    let script =
        format!("{{\"execute\":\"qmp_capabilities\"}}{commands}{{\"execute\":\"quit\"}}\n");
    // A QEMU that aborted closed the pipe; how it ended says more than EPIPE.
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
        Err(Error::new(ErrorKind::Timeout, format!("'{}' does not answer", binary.display())))
    }
}
