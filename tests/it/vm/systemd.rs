//! VMs on a host with systemd as init: each is in a scope of its own, independent of the unit that
//! created it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bosh_qemu_cpi::cid::{Cid, VmCid};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::answer::Answer;
use crate::support::host::{Host, eventually, request, vm_cid, wait_for_exit};
use crate::support::skip;

/// Runs a program that must succeed and returns its stdout.
fn run(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output().unwrap();
    assert!(output.status.success(), "{program} {words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The unit of a process.
fn unit(pid: i32) -> String {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    groups
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .unwrap()
        .rsplit('/')
        .next()
        .unwrap()
        .to_owned()
}

fn show(unit: &str, property: &str) -> String {
    run("systemctl", &["show", "--value", "--property", property, unit]).trim().to_owned()
}

/// The existing scopes of a VM.
fn scopes(vm: &VmCid) -> Vec<PathBuf> {
    let entries = fs::read_dir("/sys/fs/cgroup/machine.slice").into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| path.to_str().unwrap().contains(vm.as_str()))
        .collect()
}

/// A unit that has created a VM, as a Director's worker or a monit job does, and keeps running.
struct Worker {
    unit: String,
    vm: VmCid,
}

impl Worker {
    fn new(host: &Host) -> Self {
        let (asked, answer) = (host.path("request.json"), host.path("answer.json"));
        let mut arguments = host.vm_arguments(&host.stemcell());
        arguments[2]["cpu_weight"] = json!(200);
        fs::write(&asked, request("create_vm", &arguments)).unwrap();
        let call = host.cpi();
        let words = [call.get_program()]
            .into_iter()
            .chain(call.get_args())
            .map(|word| word.to_str().unwrap());
        let files = format!("< {} > {}", asked.display(), answer.display());
        let script = format!("{} {files}; exec sleep 1000", words.collect::<Vec<_>>().join(" "));
        let unit = format!("test-worker-{}", std::process::id());
        let (name, network) = (
            format!("--unit={unit}"),
            format!("--property=NetworkNamespacePath={}", host.namespace().path()),
        );
        run("systemd-run", &[&name, &network, "sh", "-c", &script]);
        let answer = eventually("the call answers", || {
            let text = fs::read_to_string(&answer).ok()?;
            serde_json::from_str::<Value>(&text).is_ok().then_some(text)
        });
        host.track_vms(&answer);
        let made = Answer::outcome(&answer).unwrap_or_else(|failure| panic!("{failure:?}"));
        Self { unit, vm: vm_cid(&made) }
    }
}

#[test]
fn stop_creating_unit_keeps_the_vm_in_its_own_scope() {
    if !Path::new("/run/systemd/system").exists() {
        return skip("systemd is not the init of this host");
    }
    let Some(host) = Host::new() else { return };
    let Worker { unit: worker, vm } = Worker::new(&host);
    let (qemu, supervisor) = (host.qemu(&vm).unwrap(), host.supervisor(&vm).unwrap());
    let scope = unit(supervisor.pid());
    assert_eq!(scope, format!("bosh-{vm}-{}.scope", supervisor.pid()));
    assert_eq!(unit(qemu.pid()), scope);
    let properties = ["Slice", "Delegate", "CPUWeight", "TasksMax"].map(|name| show(&scope, name));
    assert_eq!(properties, ["machine.slice", "yes", "200", "1025"]);
    assert!(
        show(&scope, "Before").contains("bosh-qemu-cpi.service"),
        "at a shutdown `host stop` comes first"
    );

    run("systemctl", &["stop", &worker]);
    assert_eq!(show(&worker, "ActiveState"), "inactive");
    let lives = || (host.qemu(&vm).unwrap().pid(), host.supervisor(&vm).unwrap().pid());
    assert_eq!(lives(), (qemu.pid(), supervisor.pid()));

    // A restarted QEMU stays in the scope, and a new supervisor joins it.
    host.kill_qemu(&vm);
    let qemu = eventually("the supervisor restarts QEMU", || host.qemu(&vm));
    assert_eq!(unit(qemu.pid()), scope);
    host.wait_for_event(&vm, "started", 2);
    supervisor.signal(Signal::SIGKILL).unwrap();
    wait_for_exit(&supervisor);
    host.ok("set_vm_metadata", &json!([vm, {}]));
    assert_eq!(unit(host.supervisor(&vm).expect("a new one").pid()), scope);
    // The next QEMU of that supervisor is in a scope named after the supervisor, because the old
    // scope may still exist.
    host.kill_qemu(&vm);
    let qemu = eventually("the supervisor restarts QEMU", || host.qemu(&vm));
    let new = format!("bosh-{vm}-{}.scope", host.supervisor(&vm).unwrap().pid());
    assert_eq!((unit(qemu.pid()), show(&new, "TasksMax")), (new, "1025".to_owned()));

    host.ok("delete_vm", &json!([vm]));
    eventually("systemd removes its scopes", || scopes(&vm).is_empty().then_some(()));
    assert_eq!(
        run(
            "systemctl",
            &["list-units", "--all", "--plain", "--no-legend", &format!("bosh-{vm}-*")]
        ),
        ""
    );
}
