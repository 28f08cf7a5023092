//! The accelerator probe: with which accelerator and CPU model the installed QEMU works on this
//! host.
//!
//! Opening `/dev/kvm` proves little. Under nested KVM, `-cpu host` can abort QEMU (QEMU 10.0, MSR
//! 0x10a), and QEMU's own `-accel kvm -accel tcg` does not fall back after an abort. And a KVM may
//! make vCPUs in which no kernel runs. So `kvm_guest` is run with each CPU model in turn.
//! `probe.json` in the run directory caches the first model that works for this binary, kernel and
//! CPU, or that KVM cannot run kernels.

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::kvm_guest::{self, Failure};
use crate::config::AccelChoice;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::store::atomic;
use crate::store::record::Accel;

/// The CPU models that are tried under KVM, the best first.
const KVM_MODELS: [&str; 3] = ["host", "host,arch-capabilities=off", "qemu64"];
/// The CPU model under TCG; every accelerator has it.
const TCG_MODEL: &str = "max";

/// The result of a probe, with the QEMU binary that it is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Verdict {
    binary: PathBuf,
    /// What [`identity`] returned: a changed binary is probed again.
    identity: [u64; 4],
    /// What [`host_identity`] returned. Missing in the results of a probe without a guest.
    host: String,
    /// The best model that works under KVM, if any.
    kvm: Option<String>,
    /// Why KVM does not work.
    why_not: Option<String>,
}

/// Returns the accelerator and CPU model for a VM: `choice` and `model` where they are set, else
/// the result of the probe.
///
/// # Errors
/// [`ErrorKind::Host`] if `choice` is KVM and no kernel runs under KVM, or if QEMU is missing.
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
    let host = host_identity();
    let path = run_dir.join("probe.json");
    let known =
        std::fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Verdict>(&text).ok());
    let is_same = |v: &Verdict| v.binary == binary && v.identity == identity && v.host == host;
    if let Some(known) = known.filter(is_same) {
        return Ok(known);
    }
    let found = probe(binary);
    // Any other failure may pass: the module may be loaded later, a busy host may be slow.
    let is_certain = found.as_ref().map_or_else(|failure| failure.is_certain, |_| true);
    let verdict = Verdict {
        binary: binary.to_owned(),
        identity,
        host,
        kvm: found.as_ref().ok().map(|model| (*model).to_owned()),
        why_not: found.as_ref().err().map(explain),
    };
    if is_certain && let Err(error) = write_cache(&verdict, &path) {
        tracing::warn!(
            error = error.report(),
            "cannot cache the accelerator probe: the next call repeats it"
        );
    }
    Ok(verdict)
}

/// The reason of a failure, and what the host lacks.
fn explain(failure: &Failure) -> String {
    let why = failure.error.report();
    if !failure.has_run || cpu_facts().is_none_or(|facts| has_virtualization(&facts)) {
        return why;
    }
    format!("{why}; this KVM has no hardware behind it: the CPU has neither VT-x nor AMD-V")
}

/// What the results of the probe depend on besides QEMU: kernel, KVM's modules and CPU, as a
/// digest.
fn host_identity() -> String {
    let kernel = std::fs::read_to_string("/proc/version").unwrap_or_default();
    let modules = ["kvm_intel", "kvm_amd", "kvm_pvm"]
        .map(|module| Path::new("/sys/module").join(module).exists());
    let cpu = cpu_facts().unwrap_or_default();
    Digest::of(format!("{kernel}{modules:?}{cpu}").as_bytes()).to_string()
}

/// The lines about the first CPU that do not change while the host runs.
fn cpu_facts() -> Option<String> {
    // One read of a page has the first CPUs only: the kernel takes long to list hundreds.
    let mut page = [0; 4096];
    let count = std::fs::File::open("/proc/cpuinfo").ok()?.read(&mut page).ok()?;
    let text = String::from_utf8_lossy(&page[..count]).into_owned();
    let first = text.split("\n\n").next()?;
    let is_kept = |line: &&str| {
        ["vendor_id", "cpu family", "model", "stepping", "microcode", "flags"]
            .iter()
            .any(|name| line.starts_with(name))
    };
    Some(first.lines().filter(is_kept).collect::<Vec<_>>().join("\n"))
}

fn has_virtualization(facts: &str) -> bool {
    facts.split_whitespace().any(|flag| flag == "vmx" || flag == "svm")
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

/// Returns the first CPU model with which the probe's guest runs under KVM.
fn probe(binary: &Path) -> Result<&'static str, Failure> {
    let device = Path::new("/dev/kvm");
    std::fs::OpenOptions::new().read(true).write(true).open(device).at("open", device)?;
    let mut last = None;
    for model in KVM_MODELS {
        match kvm_guest::run(binary, "kvm", model) {
            Ok(()) => return Ok(model),
            Err(failure) if failure.has_run => return Err(failure),
            Err(failure) => last = Some(failure),
        }
    }
    Err(last.expect("there are models to try"))
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[allow(clippy::print_stderr)]
    fn skip(missing: &Path) {
        eprintln!("skipped: {} is missing", missing.display());
    }

    #[test]
    fn the_guest_passes_where_kernels_run() {
        let binary = Path::new("/usr/bin/qemu-system-x86_64");
        if !binary.exists() {
            return skip(binary);
        }
        kvm_guest::run(binary, "tcg", TCG_MODEL).unwrap();
    }

    /// A QEMU that records its start, writes to its monitor, and ends.
    fn fake_qemu(dir: &Path, end: &str) -> PathBuf {
        let path = dir.join("qemu");
        let text = format!(
            "#!/bin/bash\necho x >> {0}/starts\nwhile [ \"$1\" != -debugcon ]; do shift; done\n\
             printf rpl > \"${{2#file:}}\"\n{end}\n",
            dir.display()
        );
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn starts(dir: &Path) -> usize {
        std::fs::read_to_string(dir.join("starts")).map_or(0, |text| text.lines().count())
    }

    #[test]
    fn a_kvm_that_cannot_execute_the_guest_is_refused_or_replaced_and_probed_once() {
        if !Path::new("/dev/kvm").exists() {
            return skip(Path::new("/dev/kvm"));
        }
        let dir = tempfile::tempdir().unwrap();
        let end = "echo 'KVM internal error. Suberror: 1' >&2; echo '{\"event\": \"STOP\"}'; \
                   exec sleep 60";
        let binary = fake_qemu(dir.path(), end);
        let ask = |choice| accelerator(dir.path(), &binary, choice, None);
        assert_eq!(ask(AccelChoice::Auto).unwrap(), (Accel::Tcg, "max".to_owned()));
        let refused = ask(AccelChoice::Kvm).unwrap_err().report();
        assert!(
            refused.contains(
                "ended after long mode: KVM cannot execute its code (KVM internal error. Suberror: 1)"
            ),
            "{refused}"
        );
        assert_eq!(starts(dir.path()), 1, "no other model is tried, and the result is cached");

        // The result of another kernel or CPU, and one of a version without the guest.
        let path = dir.path().join("probe.json");
        let mut cached: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        for host in [Some("another"), None] {
            match host {
                Some(host) => cached["host"] = host.into(),
                None => drop(cached.as_object_mut().unwrap().remove("host")),
            }
            cached["kvm"] = "host".into();
            std::fs::write(&path, cached.to_string()).unwrap();
            assert_eq!(ask(AccelChoice::Auto).unwrap().0, Accel::Tcg);
        }
        assert_eq!(starts(dir.path()), 3);
    }

    #[test]
    fn a_guest_that_uses_up_its_cpu_time_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let binary = fake_qemu(dir.path(), "while :; do :; done");
        let failure = kvm_guest::run(&binary, "kvm", "host").unwrap_err();
        assert!(failure.has_run && !failure.is_certain, "{failure:?}");
        assert!(failure.error.report().contains("it used 2 s of CPU time"), "{failure:?}");
    }

    #[test]
    fn a_guest_that_reports_success_makes_kvm_the_choice() {
        if !Path::new("/dev/kvm").exists() {
            return skip(Path::new("/dev/kvm"));
        }
        let dir = tempfile::tempdir().unwrap();
        let binary = fake_qemu(dir.path(), "exit 171");
        for _ in 0..2 {
            let chosen = accelerator(dir.path(), &binary, AccelChoice::Auto, None).unwrap();
            assert_eq!(chosen, (Accel::Kvm, "host".to_owned()));
        }
        assert_eq!(starts(dir.path()), 1);
    }
}
