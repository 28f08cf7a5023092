//! Calls under resource limits of their caller: what VMs inherit, and calls without memory, files
//! or descriptors.

use std::fs;

use bosh_qemu_cpi::cid::VmCid;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use serde_json::json;

use crate::support::answer::Answer;
use crate::support::host::{GUEST, Host, eventually, vm_cid, wait_for_exit};

/// Soft limits that would end a QEMU, a supervisor or a call.
const HARMFUL: [&str; 7] = [
    "prlimit",
    "--cpu=3600:",
    "--fsize=100000:",
    "--nofile=16:",
    "--memlock=0:",
    "--stack=1048576:",
    "--sigpending=1:",
];
/// As for the root of a container: no limit can exceed the caller's hard limit.
const CONTAINED: [&str; 2] = ["setpriv", "--bounding-set=-sys_resource"];

fn limits(pid: i32) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ") + "\n").collect()
}

fn vm_started_by(host: &Host, words: &[&str]) -> VmCid {
    let arguments = host.vm_arguments(&host.import(GUEST));
    let Answer { outcome, .. } = host.call_by(words, "create_vm", &arguments);
    vm_cid(&outcome.unwrap())
}

#[test]
fn create_vm_under_limits_of_its_caller_gives_the_vm_its_own() {
    let Some(host) = Host::new() else { return };
    let vm = vm_started_by(&host, &HARMFUL);
    let pids = [host.qemu(&vm).unwrap().pid(), host.supervisor(&vm).unwrap().pid()];
    for limits in pids.map(limits) {
        for (name, resource, wanted) in [
            ("cpu time", Resource::RLIMIT_CPU, RLIM_INFINITY),
            ("file size", Resource::RLIMIT_FSIZE, RLIM_INFINITY),
            ("open files", Resource::RLIMIT_NOFILE, 4096),
            ("locked memory", Resource::RLIMIT_MEMLOCK, 8 << 20),
            ("stack size", Resource::RLIMIT_STACK, 8 << 20),
            ("pending signals", Resource::RLIMIT_SIGPENDING, 4096),
        ] {
            // A container's root cannot raise a hard limit.
            let (_, hard) = getrlimit(resource).unwrap();
            let value = match wanted.min(hard) {
                RLIM_INFINITY => "unlimited".to_owned(),
                value => value.to_string(),
            };
            assert!(limits.contains(&format!("Max {name} {value} {value}")), "{name} in {limits}");
        }
    }
}

#[test]
fn create_vm_in_a_container_without_core_dumps_succeeds() {
    let Some(host) = Host::new() else { return };
    let words = [&["prlimit", "--core=0", "--memlock=0"], &CONTAINED[..]].concat();
    let vm = vm_started_by(&host, &words);
    let limits = limits(host.qemu(&vm).unwrap().pid());
    assert!(limits.contains("Max core file size 0 0"), "{limits}");
    let log = fs::read_to_string(host.paths(&vm).supervisor_log()).unwrap();
    assert!(log.contains("limit=\"MEMLOCK\""), "{log}");
}

#[test]
fn call_without_files_memory_or_descriptors_is_answered_and_leaves_nothing() {
    let Some(host) = Host::new() else { return };
    let stemcell = host.import(GUEST);
    let arguments = host.vm_arguments(&stemcell);
    for limit in ["--fsize=0", "--fsize=100000", "--nofile=4", "--nofile=8", "--as=200000000"] {
        let words = [&["prlimit", limit], &CONTAINED[..]].concat();
        // An answer that is no JSON object fails this test.
        let answer = host.call_by(&words, "create_vm", &arguments);
        let kind = answer.outcome.unwrap_err().kind;
        assert!(!["CpiError", "NotImplemented"].contains(&kind.as_str()), "{limit}: {kind}");
    }
    host.ok("delete_stemcell", &json!([stemcell]));
    host.assert_no_leaks();
}

/// A call is not dumpable, so its children cannot open its descriptors by its pid.
#[test]
fn create_disk_without_ptrace_has_qemu_img_fill_the_image() {
    let Some(host) = Host::new() else { return };
    let words = ["setpriv", "--bounding-set=-sys_ptrace"];
    for properties in [json!({"preallocation": "full"}), json!({"encrypted": true})] {
        let disk = host.call_by(&words, "create_disk", &json!([8, properties, null]));
        host.ok("delete_disk", &json!([disk.outcome.unwrap()]));
    }
    host.assert_no_leaks();
}

/// A core dump would show agent settings, env and keys, and so would another process without
/// CAP_SYS_PTRACE that could read a supervisor's memory.
#[test]
fn supervisor_without_ptrace_is_not_dumpable_and_can_be_ended() {
    let Some(host) = Host::new() else { return };
    let words = ["setpriv", "--bounding-set=-sys_ptrace"];
    let vm = vm_started_by(&host, &words);
    // The kernel lets a process of the same user and capabilities read this link if and only if the
    // process is dumpable (ptrace(2)).
    let can_inspect = |pid: u32| {
        let mut command = std::process::Command::new(words[0]);
        command.arg(words[1]).args(["readlink", &format!("/proc/{pid}/exe")]);
        command.output().unwrap().status.success()
    };
    let mut other =
        std::process::Command::new(words[0]).args([words[1], "sleep", "60"]).spawn().unwrap();
    eventually("a dumpable process", || can_inspect(other.id()).then_some(()));
    other.kill().unwrap();
    other.wait().unwrap();
    let supervisor = host.supervisor(&vm).unwrap();
    assert!(!can_inspect(supervisor.pid() as u32));
    assert_eq!(host.call_by(&words, "delete_vm", &json!([vm])).outcome.unwrap(), json!(null));
    wait_for_exit(&supervisor);
    host.delete_everything();
    host.assert_no_leaks();
}
