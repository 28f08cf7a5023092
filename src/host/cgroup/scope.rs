//! Groups on a host that systemd runs: there the tree is systemd's, and only systemd may make groups in it.
//!
//! "The root control group may only be written to by systemd (PID 1)" (systemd.io/CONTROL_GROUP_INTERFACE): groups made
//! beside it work today, but systemd is free to take controllers away from them. What is asked for instead is a transient
//! scope for each VM, `machine.slice/bosh-<cid>-<pid>.scope`, delegated, so that systemd leaves alone what happens in it:
//!
//! - the limits are its properties, so systemd writes them and does not undo them;
//! - it is ordered before our unit, so that at shutdown `host stop` has powered the guests off when the scope is ended;
//! - with `Delegate` an OOM kill in it does not have systemd end the rest of it (OOMPolicy, systemd.scope(5));
//! - systemd removes it with its last process. A VM that starts again gets one of a new name, because the old one may
//!   still be there for a moment.
//!
//! Asked through `busctl`, which comes with systemd: one call at each start is not worth a D-Bus library.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::Limits;
use crate::error::{Error, ErrorKind, Result};

/// There where systemd is the init (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";
/// Where systemd has VMs (systemd.special(7)).
const SLICE: &str = "machine.slice";
/// Of `contrib/systemd`.
const UNIT: &str = "bosh-qemu-cpi.service";
/// systemd answers in milliseconds, and then moves the process in its own time.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked whether it did.
const LOOK: Duration = Duration::from_millis(2);

/// Whether systemd runs this host.
pub(super) fn is_wanted() -> bool {
    Path::new(BOOTED).is_dir()
}

/// The scopes of the VM `name` in the hierarchy at `root`.
pub(super) fn of(root: &Path, name: &str) -> Vec<PathBuf> {
    let prefix = format!("bosh-{name}-");
    let entries = root.join(SLICE).read_dir().into_iter().flatten().flatten();
    let ours = entries.filter(|entry| {
        let unit = entry.file_name();
        unit.to_str().is_some_and(|unit| unit.starts_with(&prefix) && unit.ends_with(".scope"))
    });
    ours.map(|entry| entry.path()).collect()
}

/// Has systemd move this process into a new scope of the VM `name`, if it is not in one already: a restart stays where it is.
///
/// # Errors
/// What systemd said; the process is where it was.
pub(super) fn enter(name: &str, limits: &Limits) -> Result<()> {
    let pid = std::process::id();
    let unit = format!("bosh-{name}-{pid}.scope");
    let is_inside = || std::fs::read_to_string("/proc/self/cgroup").is_ok_and(|groups| groups.contains(&unit));
    if is_inside() {
        return Ok(());
    }
    let mut busctl = Command::new("busctl");
    busctl.args(["--system", "--timeout=10"]).args(call(&unit, name, pid, limits));
    let asked = busctl.stdin(Stdio::null()).output().map_err(|e| Error::os("run 'busctl'", e))?;
    if !asked.status.success() {
        let said: String = String::from_utf8_lossy(&asked.stderr).trim().chars().take(300).collect();
        return Err(Error::new(ErrorKind::Host, format!("systemd made no scope '{unit}': {said}")));
    }
    // The answer names a job; that it is done is seen by where we are.
    let deadline = Instant::now() + PATIENCE;
    while !is_inside() {
        if Instant::now() > deadline {
            return Err(Error::new(ErrorKind::Timeout, format!("systemd did not start its scope '{unit}' in time")));
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// The words of the D-Bus call, org.freedesktop.systemd1(5): name, mode, properties with their types, no other units.
fn call(unit: &str, name: &str, pid: u32, limits: &Limits) -> Vec<String> {
    let mut properties = vec![
        vec!["Description".to_owned(), "s".into(), format!("BOSH VM {name}")],
        vec!["PIDs".into(), "au".into(), "1".into(), pid.to_string()],
        vec!["Slice".into(), "s".into(), SLICE.into()],
        vec!["Delegate".into(), "b".into(), "true".into()],
        vec!["CollectMode".into(), "s".into(), "inactive-or-failed".into()],
        // Units stop in the reverse order of their start.
        vec!["Before".into(), "as".into(), "1".into(), UNIT.into()],
        vec!["TasksMax".into(), "t".into(), limits.pids.to_string()],
    ];
    if let Some(memory) = limits.memory {
        properties.push(vec!["MemoryMax".into(), "t".into(), memory.get().to_string()]);
    }
    if let Some(weight) = limits.cpu_weight {
        properties.push(vec!["CPUWeight".into(), "t".into(), weight.to_string()]);
    }
    let target = ["org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"];
    let mut words = vec!["call".to_owned()];
    words.extend(target.map(str::to_owned));
    words.extend(["StartTransientUnit", "ssa(sv)a(sa(sv))", unit, "fail"].map(str::to_owned));
    words.push(properties.len().to_string());
    words.extend(properties.into_iter().flatten());
    words.push("0".to_owned());
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Bytes;

    #[test]
    fn the_call_in_busctls_words() {
        let limits = Limits { memory: Some(Bytes(1 << 30)), pids: 500, cpu_weight: Some(200) };
        let words = call("bosh-vm-a-7.scope", "vm-a", 7, &limits).join(" ");
        assert_eq!(
            words,
            "call org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager \
             StartTransientUnit ssa(sv)a(sa(sv)) bosh-vm-a-7.scope fail 9 Description s BOSH VM vm-a PIDs au 1 7 \
             Slice s machine.slice Delegate b true CollectMode s inactive-or-failed Before as 1 bosh-qemu-cpi.service \
             TasksMax t 500 MemoryMax t 1073741824 CPUWeight t 200 0"
        );
        let plain = call("u", "vm-a", 7, &Limits { memory: None, cpu_weight: None, ..limits }).join(" ");
        assert!(plain.contains(" fail 7 ") && plain.ends_with("TasksMax t 500 0"), "{plain}");
    }

    #[test]
    fn a_vms_scopes_are_its_own() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(of(root.path(), "vm-a"), Vec::<PathBuf>::new());
        let slice = root.path().join(SLICE);
        for unit in ["bosh-vm-a-7.scope", "bosh-vm-ab-8.scope", "bosh-vm-a-9.service", "machine-qemu.scope"] {
            std::fs::create_dir_all(slice.join(unit)).unwrap();
        }
        assert_eq!(of(root.path(), "vm-a"), [slice.join("bosh-vm-a-7.scope")]);
    }
}
