//! Transports that cannot connect, break or hang.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use bosh_qemu_cpi::cid::{DiskCid, VmCid};
use bosh_qemu_cpi::store::{DiskRecord, Phase, VmRecord};
use nix::sys::signal::Signal;
use serde_json::json;

use super::{Pair, answer, answering, processes};
use crate::support::host::{Host, eventually, text, vm_cid};
use crate::support::remote::{Director, Sshd};

impl Pair {
    fn cable(&self, state: &str) {
        self.director.namespace().ip(&format!("link set to0 {state}"));
        if state == "up" {
            self.director.namespace().ip("address replace 192.0.2.0/31 dev to0");
        }
    }
}

#[test]
fn call_to_unreachable_host_names_the_reason() {
    let Some(pair) = Pair::new() else { return };
    let other = pair.sshd.read("caller.pub");
    let stranger = pair.director.path("stranger");
    let made = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-f"])
        .arg(&stranger)
        .status();
    assert!(made.unwrap().success());
    let stranger = fs::read_to_string(stranger).unwrap();
    for (key, value, expected) in [
        ("port", json!(2), "connection refused"),
        ("host_key", json!(other), "the host's key is not the one in 'host_key'"),
        ("private_key", json!(stranger), "the host refuses the key in 'private_key'"),
        ("private_key", json!("-----BEGIN nothing"), "ssh cannot read the key in 'private_key'"),
        ("host", json!("no-such-host.invalid"), "the host's name is unknown here"),
        ("host", json!("198.51.100.1"), "no route to the host"),
    ] {
        let transport = pair.transport_with(key, &value);
        pair.director.configure(&json!({"transport": transport}));
        let refused = pair.director.call("has_vm", &json!(["vm-1"]));
        let message = &refused.failure().message;
        let host = transport["host"].as_str().unwrap();
        assert!(message.contains(&format!("host '{host}': connect: {expected}")), "{message}");
        for text in [&refused.stdout, &refused.stderr] {
            assert!(!text.contains("BEGIN") && !text.contains(&stranger[60..80]), "{text}");
        }
    }
}

#[test]
fn call_to_host_without_program_names_the_reason() {
    let Some(pair) = Pair::new() else { return };
    for (command, expected) in [
        ("/nowhere/bosh-qemu-cpi host serve", "the program is not there"),
        ("echo hello", "the program that answers there is not bosh-qemu-cpi"),
        ("echo >&2 locked out; exit 3", "the host reports: locked out"),
        ("exit 4", "the host's command ended with status 4"),
    ] {
        pair.director.close_connections();
        pair.sshd.authorize(command);
        let refused = pair.director.call("has_vm", &json!(["vm-1"]));
        assert!(refused.failure().message.contains(expected), "{command}: {refused:?}");
    }
}

#[test]
fn call_to_hung_host_fails_at_its_deadline() {
    let Some(pair) = Pair::new() else { return };
    pair.director
        .configure(&json!({"transport": pair.sshd.transport(), "deadlines": {"has_vm": 1}}));
    assert_eq!(pair.director.ok("has_vm", &json!(["vm-1"])), false);
    // The host greets and sends nothing more.
    pair.director.close_connections();
    pair.sshd.authorize(&format!(
        "echo '{}'; sleep 600",
        super::stemcell_upload::GREETING.replace('"', "\\\"")
    ));
    let began = Instant::now();
    let refused = pair.director.call("has_vm", &json!(["vm-1"]));
    assert!(refused.failure().message.contains("did not answer by the deadline"), "{refused:?}");
    assert!(began.elapsed() < Duration::from_secs(25), "{:?}", began.elapsed());
}

#[test]
fn call_to_host_that_keeps_its_session_leaves_no_process() {
    let Some(pair) = Pair::new() else { return };
    let script = pair.director.path("script");
    answering(&script, super::stemcell_upload::GREETING, "");
    let stays = fs::read_to_string(&script).unwrap() + "exec sleep 600\n";
    fs::write(&script, stays).unwrap();
    pair.sshd.authorize(&format!("sh {}", script.display()));
    assert_eq!(pair.director.ok("has_vm", &json!(["vm-1"])), false);
    assert!(pair.calling().is_empty());
}

#[test]
fn call_beyond_max_sessions_opens_another_connection() {
    let Some(pair) = Pair::with(&json!({}), "MaxSessions 2") else { return };
    let (script, go) = (pair.director.path("script"), pair.director.path("go"));
    let wait = format!("until test -e {}; do sleep 0.1; done", go.display());
    answering(&script, super::stemcell_upload::GREETING, &wait);
    pair.sshd.authorize(&format!("sh {}", script.display()));
    let calls: Vec<_> = (0..5).map(|_| pair.director.start("has_vm", &json!(["vm-1"]))).collect();
    // All five run at the same time.
    let script = script.display().to_string();
    eventually("five sessions", || (processes(&["sh\0", &script]).len() == 5).then_some(()));
    fs::write(go, "").unwrap();
    for call in calls {
        assert_eq!(*answer(call).result(), false);
    }
}

#[test]
fn call_through_ssh_leaks_no_private_key() {
    let Some(pair) = Pair::new() else { return };
    let secret = pair.sshd.read("caller").lines().nth(2).unwrap().to_owned();
    pair.sshd.authorize("sleep 600");
    let mut call = pair.director.start("has_vm", &json!(["vm-1"]));
    let ssh = eventually("ssh runs", || pair.calling().into_iter().next());
    for name in ["cmdline", "environ"] {
        let text = fs::read(format!("/proc/{}/{name}", ssh.pid())).unwrap();
        assert!(!String::from_utf8_lossy(&text).contains(&secret), "{name}");
        assert!(!String::from_utf8_lossy(&text).contains("BEGIN"), "{name}");
    }
    let files = walk(&pair.director.path(""));
    assert!(!files.is_empty());
    for file in files.iter().filter(|file| !file.ends_with("cpi.json")) {
        let text = fs::read(file).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&text).contains(&secret), "{}", file.display());
    }
    call.kill().unwrap();
    assert_eq!(call.wait().unwrap().signal(), Some(9));
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

#[test]
fn call_after_cut_idle_connection_reconnects() {
    let Some(pair) = Pair::new() else { return };
    pair.director.ok("has_vm", &json!(["vm-1"]));
    assert_eq!(pair.director.connections().len(), 1);
    // The host's end is killed, and the master on this machine has not noticed.
    for process in processes(&["sshd: root@notty"]) {
        let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        if namespace(process.pid()) == namespace(pair.sshd.pid()) {
            process.signal(Signal::SIGKILL).unwrap();
        }
    }
    pair.director.ok("has_vm", &json!(["vm-1"]));
}

#[test]
fn call_over_dead_link_fails_in_time() {
    let Some(pair) = Pair::new() else { return };
    pair.director.ok("has_vm", &json!(["vm-1"]));
    pair.cable("down");
    let began = Instant::now();
    let refused = pair.director.call("has_vm", &json!(["vm-1"]));
    assert!(began.elapsed() < Duration::from_secs(45), "{:?}", began.elapsed());
    assert_eq!(refused.failure().kind, "CloudError", "{refused:?}");
    pair.cable("up");
    pair.director.close_connections();
    pair.director.ok("has_vm", &json!(["vm-1"]));
}

/// The host's VMs in phase `ready`, and the number of other VM records.
fn vms(host: &Host) -> (Vec<VmCid>, usize) {
    let all = host.store().list::<VmRecord>().unwrap();
    let whole = |vm: &VmCid| {
        host.store().read::<VmRecord>(vm).unwrap().is_some_and(|vm| vm.phase == Phase::Ready)
    };
    let ready: Vec<_> = all.iter().filter(|vm| whole(vm)).cloned().collect();
    let others = all.len() - ready.len();
    (ready, others)
}

#[test]
fn create_vm_over_cut_link_leaves_nothing() {
    let Some(pair) = Pair::new() else { return };
    let stemcell = pair.host.stemcell();
    let arguments = pair.host.vm_arguments(&stemcell);
    pair.director.ok("has_vm", &json!(["vm-1"]));
    // ssh is killed before the request, during the work, and near the answer.
    for delay in [0, 30, 60, 90, 120, 200, 300] {
        let call = pair.director.start("create_vm", &arguments);
        let ssh = eventually("ssh runs", || pair.calling().into_iter().next());
        std::thread::sleep(Duration::from_millis(delay));
        let _ = ssh.signal(Signal::SIGKILL);
        let answer = answer(call);
        match &answer.outcome {
            Ok(created) => {
                pair.host.track_vms(&created.to_string());
                pair.director.ok("delete_vm", &json!([created[0]]));
            }
            Err(failure) => {
                assert!(failure.message.contains(pair.sshd.address()), "{failure:?}");
                assert!(failure.ok_to_retry, "nothing is left, so it can be repeated: {failure:?}");
            }
        }
        eventually("the host is done", || pair.answering().is_empty().then_some(()));
        assert_eq!(vms(&pair.host), (vec![], 0), "after {delay} ms: {answer:?}");
    }
    let vm = vm_cid(&pair.director.ok("create_vm", &arguments));
    pair.host.track_vms(&vm.to_string());
    pair.director.ok("delete_vm", &json!([vm]));
}

#[test]
fn kill_caller_of_create_vm_leaves_a_whole_vm_or_none() {
    let Some(pair) = Pair::new() else { return };
    let stemcell = pair.host.stemcell();
    let arguments = pair.host.vm_arguments(&stemcell);
    pair.director.ok("has_vm", &json!(["vm-1"]));
    for delay in [50, 150, 250, 400] {
        let mut call = pair.director.start("create_vm", &arguments);
        eventually("ssh runs", || pair.calling().into_iter().next());
        std::thread::sleep(Duration::from_millis(delay));
        call.kill().unwrap();
        let heard = call.wait_with_output().unwrap().stdout;
        eventually("the host is done", || pair.answering().is_empty().then_some(()));
        let (ready, others) = vms(&pair.host);
        ready.iter().for_each(|vm| pair.host.track_vms(&vm.to_string()));
        assert!(ready.len() <= 1 && others == 0, "after {delay} ms: {ready:?} and {others} others");
        if !heard.is_empty() {
            // The call had answered before it was killed.
            assert_eq!(ready.len(), 1, "{}", String::from_utf8_lossy(&heard));
            pair.director.ok("delete_vm", &json!([ready[0]]));
        }
        // The new VM has the same address: an unacknowledged VM with it makes way.
        let vm = vm_cid(&pair.director.ok("create_vm", &arguments));
        pair.host.track_vms(&vm.to_string());
        assert_eq!(vms(&pair.host), (vec![vm.clone()], 0));
        pair.director.ok("delete_vm", &json!([vm]));
    }
}

#[test]
fn create_disk_without_reader_is_undone() {
    let Some(pair) = Pair::new() else { return };
    let mut call = pair.director.start("create_disk", &json!([1, {}]));
    drop(call.stdout.take());
    call.wait().unwrap();
    eventually("the disk is gone", || {
        pair.host.store().list::<DiskRecord>().unwrap().is_empty().then_some(())
    });
}

#[test]
fn attach_disk_over_cut_link_is_finished() {
    let Some(pair) = Pair::new() else { return };
    let (vm, disk) = (pair.host.booted_vm(), pair.host.disk());
    let mut call = pair.director.start("attach_disk", &json!([vm, disk]));
    let ssh = eventually("ssh runs", || pair.calling().into_iter().next());
    // The call may end before the test sees the host's process.
    let is_over = |call: &mut Child| call.try_wait().unwrap().is_some();
    eventually("the host is asked", || {
        (!pair.answering().is_empty() || is_over(&mut call)).then_some(())
    });
    let _ = ssh.signal(Signal::SIGKILL);
    let answer = answer(call);
    eventually("the host is done", || pair.answering().is_empty().then_some(()));
    // The same call succeeds after either outcome, and returns the disk's path.
    let hint = pair.director.ok("attach_disk", &json!([vm, disk]));
    assert!(hint["path"].as_str().unwrap().ends_with(&disk.to_string()), "{answer:?}");
    pair.director.ok("detach_disk", &json!([vm, disk]));
}

#[test]
fn create_vms_from_two_directors_succeeds() {
    let Some(pair) = Pair::new() else { return };
    let Some(other) = Director::new() else { return };
    let Some(sshd) = Sshd::start(&other, &pair.host, 1, "") else { return };
    other.configure(&json!({"transport": sshd.transport()}));
    let stemcell = pair.host.stemcell();
    let (one, two) = (pair.host.vm_arguments(&stemcell), pair.host.vm_arguments(&stemcell));
    let calls = [pair.director.start("create_vm", &one), other.start("create_vm", &two)];
    let created = calls.map(|call| vm_cid(answer(call).result()));
    created.iter().for_each(|vm| pair.host.track_vms(&vm.to_string()));
    assert_eq!(vms(&pair.host).0.len(), 2);
    // Each Director can use the VMs of the other: they share the host.
    assert_eq!(other.ok("has_vm", &json!([created[0]])), true);
    pair.director.ok("delete_vm", &json!([created[1]]));
    other.ok("delete_vm", &json!([created[0]]));
}

#[test]
fn call_concurrently_shares_connections() {
    let Some(pair) = Pair::new() else { return };
    let disk: DiskCid = text(&pair.director.ok("create_disk", &json!([1, {}]))).parse().unwrap();
    let calls: Vec<_> = (0..32).map(|_| pair.director.start("has_disk", &json!([disk]))).collect();
    for call in calls {
        assert_eq!(*answer(call).result(), true);
    }
    let connections = pair.director.connections().len();
    assert!((1..=4).contains(&connections), "{connections} connections for 32 calls, ten on each");
    pair.director.ok("delete_disk", &json!([disk]));
}
