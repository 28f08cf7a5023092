//! Systemd scopes: a VM's control groups on a host that runs systemd, which owns the tree.
//!
//! "The root control group may only be written to by systemd (PID 1)"
//! (systemd.io/CONTROL_GROUP_INTERFACE). Groups made beside systemd's work today, but systemd may
//! take controllers away from them. So each VM gets a transient scope,
//! `machine.slice/bosh-<cid>-<pid>.scope`. It is delegated, so systemd does not change the groups
//! inside it:
//!
//! - The limits are properties of the scope, so systemd writes them and does not undo them.
//! - The scope is ordered before `bosh-qemu-cpi.service`. So at shutdown, `host stop` has powered
//!   the guests off before systemd ends the scope.
//! - With `Delegate`, systemd does not end the rest of the scope after an OOM kill in it
//!   (OOMPolicy, systemd.scope(5)).
//! - Systemd removes the scope with its last process. A VM that starts again gets a scope with a
//!   new name, because the old one may still exist for a moment.
//!
//! The calls go through `busctl`, which is part of systemd: one call at each start does not justify
//! a D-Bus library.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::Limits;
use crate::error::{Error, ErrorKind, Result};

/// A directory that exists where systemd is the init process (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";
/// Systemd's slice for VMs (systemd.special(7)).
const SLICE: &str = "machine.slice";
/// The unit in `contrib/systemd` that starts and stops all VMs.
const UNIT: &str = "bosh-qemu-cpi.service";
/// How long systemd may take to move the process into the scope, after it has answered.
const SCOPE_START_TIMEOUT: Duration = Duration::from_secs(10);
/// How often to check whether systemd has moved the process.
const SCOPE_POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Returns whether systemd is the host's init process.
pub(super) fn is_systemd_host() -> bool {
    Path::new(BOOTED).is_dir()
}

/// Returns the groups of the scopes of the VM `name` in the hierarchy at `root`.
pub(super) fn dirs_of(root: &Path, name: &str) -> Vec<PathBuf> {
    let prefix = format!("bosh-{name}-");
    let entries = root.join(SLICE).read_dir().into_iter().flatten().flatten();
    let scopes = entries.filter(|entry| {
        let unit = entry.file_name();
        unit.to_str().is_some_and(|unit| unit.starts_with(&prefix) && unit.ends_with(".scope"))
    });
    scopes.map(|entry| entry.path()).collect()
}

/// Has systemd move this process into a new scope of the VM `name`. At a restart of the VM the
/// process is already in its scope; then only the limits are set again.
///
/// # Errors
/// Systemd's error. The process stays in its old group.
pub(super) fn enter(name: &str, limits: &Limits) -> Result<()> {
    let pid = std::process::id();
    let unit = format!("bosh-{name}-{pid}.scope");
    let is_inside =
        || std::fs::read_to_string("/proc/self/cgroup").is_ok_and(|groups| groups.contains(&unit));
    if is_inside() {
        if let Err(error) = call_systemd(&limit_call(&unit, limits)) {
            tracing::warn!(error = error.report(), "cannot set the VM's limits again");
        }
        return Ok(());
    }
    call_systemd(&start_call(&unit, name, pid, limits))
        .map_err(|error| error.during(format!("have systemd make scope '{unit}'")))?;
    // Systemd answers before its job is done. /proc/self/cgroup shows when it is.
    let deadline = Instant::now() + SCOPE_START_TIMEOUT;
    while !is_inside() {
        if Instant::now() > deadline {
            return Err(Error::new(
                ErrorKind::Timeout,
                format!("systemd did not start its scope '{unit}' in time"),
            ));
        }
        std::thread::sleep(SCOPE_POLL_INTERVAL);
    }
    Ok(())
}

/// Calls systemd's manager over D-Bus (org.freedesktop.systemd1(5)).
fn call_systemd(call: &[String]) -> Result<()> {
    let mut busctl = Command::new("busctl");
    busctl.args(["--system", "--timeout=10", "call"]);
    busctl.args([
        "org.freedesktop.systemd1",
        "/org/freedesktop/systemd1",
        "org.freedesktop.systemd1.Manager",
    ]);
    let output = busctl
        .args(call)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| Error::os("run 'busctl'", e))?;
    if output.status.success() {
        return Ok(());
    }
    let stderr: String = String::from_utf8_lossy(&output.stderr).trim().chars().take(300).collect();
    Err(Error::new(ErrorKind::Host, format!("busctl: {stderr}")))
}

/// Returns the arguments of the call that starts the scope: name, mode, properties with their
/// types, no other units.
fn start_call(unit: &str, name: &str, pid: u32, limits: &Limits) -> Vec<String> {
    let mut properties = vec![
        property("Description", "s", &[&format!("BOSH VM {name}")]),
        property("PIDs", "au", &["1", &pid.to_string()]),
        property("Slice", "s", &[SLICE]),
        property("Delegate", "b", &["true"]),
        property("CollectMode", "s", &["inactive-or-failed"]),
        // Units stop in the reverse order, so the service stops before the scope.
        property("Before", "as", &["1", UNIT]),
    ];
    properties.extend(properties_of(limits));
    let mut words =
        ["StartTransientUnit", "ssa(sv)a(sa(sv))", unit, "fail"].map(str::to_owned).to_vec();
    words.push(properties.len().to_string());
    words.extend(properties.into_iter().flatten());
    words.push("0".to_owned());
    words
}

/// Returns the arguments of the call that limits an existing scope: name, runtime only, properties
/// with their types.
fn limit_call(unit: &str, limits: &Limits) -> Vec<String> {
    let properties = properties_of(limits);
    let mut words = ["SetUnitProperties", "sba(sv)", unit, "true"].map(str::to_owned).to_vec();
    words.push(properties.len().to_string());
    words.extend(properties.into_iter().flatten());
    words
}

fn properties_of(limits: &Limits) -> Vec<Vec<String>> {
    let memory =
        limits.memory.map(|memory| property("MemoryMax", "t", &[&memory.get().to_string()]));
    let weight = limits.cpu_weight.map(|weight| property("CPUWeight", "t", &[&weight.to_string()]));
    let pids = property("TasksMax", "t", &[&limits.pids.to_string()]);
    std::iter::once(pids).chain(memory).chain(weight).collect()
}

/// Returns a property as arguments of busctl(1).
fn property(name: &str, kind: &str, value: &[&str]) -> Vec<String> {
    [name, kind].iter().chain(value).map(|word| (*word).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Bytes;

    #[test]
    fn calls_have_the_arguments_of_busctl() {
        let limits = Limits { memory: Some(Bytes(1 << 30)), pids: 500, cpu_weight: Some(200) };
        let words = start_call("bosh-vm-a-7.scope", "vm-a", 7, &limits).join(" ");
        assert_eq!(
            words,
            "StartTransientUnit ssa(sv)a(sa(sv)) bosh-vm-a-7.scope fail 9 \
             Description s BOSH VM vm-a PIDs au 1 7 Slice s machine.slice Delegate b true \
             CollectMode s inactive-or-failed Before as 1 bosh-qemu-cpi.service \
             TasksMax t 500 MemoryMax t 1073741824 CPUWeight t 200 0"
        );
        let again = limit_call("bosh-vm-a-7.scope", &limits).join(" ");
        let properties = "TasksMax t 500 MemoryMax t 1073741824 CPUWeight t 200";
        assert_eq!(
            again,
            format!("SetUnitProperties sba(sv) bosh-vm-a-7.scope true 3 {properties}")
        );
        let plain =
            start_call("u", "vm-a", 7, &Limits { memory: None, cpu_weight: None, ..limits })
                .join(" ");
        assert!(plain.contains(" fail 7 ") && plain.ends_with("TasksMax t 500 0"), "{plain}");
    }

    #[test]
    fn dirs_of_returns_only_scopes_of_the_vm() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(dirs_of(root.path(), "vm-a"), Vec::<PathBuf>::new());
        let slice = root.path().join(SLICE);
        for unit in
            ["bosh-vm-a-7.scope", "bosh-vm-ab-8.scope", "bosh-vm-a-9.service", "machine-qemu.scope"]
        {
            std::fs::create_dir_all(slice.join(unit)).unwrap();
        }
        assert_eq!(dirs_of(root.path(), "vm-a"), [slice.join("bosh-vm-a-7.scope")]);
    }
}
