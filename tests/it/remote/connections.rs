//! ssh connections that calls share: their master processes, and what they never do.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bosh_qemu_cpi::sys::pidfd::Process;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getsid};
use serde_json::{Value, json};

use super::stemcell_upload::GREETING;
use super::{Pair, answer, answering, processes};
use crate::support::host::eventually;

/// Time in which a call is answered although the master of its connection is stopped.
const STOPPED_MASTER_TIMEOUT: Duration = Duration::from_secs(2);

fn has_vm() -> Value {
    json!(["vm-1"])
}

impl Pair {
    /// The master processes of the caller's connections.
    fn masters(&self) -> Vec<Process> {
        processes(&["ssh: ", &self.director.path("").display().to_string(), " [mux]"])
    }

    fn master(&self) -> Process {
        let mut masters = self.masters();
        assert_eq!(masters.len(), 1);
        masters.remove(0)
    }

    /// The connections to the host that are logged in.
    fn logged_in(&self) -> usize {
        let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        let host = namespace(self.sshd.pid());
        let sessions = processes(&["sshd: root@notty"]);
        sessions.iter().filter(|process| namespace(process.pid()) == host).count()
    }

    /// Has the host's program wait for a file before it answers. Returns the script and the file.
    fn hold_answers(&self) -> (String, PathBuf) {
        let (script, go) = (self.director.path("script"), self.director.path("go"));
        let wait = format!("until test -e {}; do sleep 0.1; done", go.display());
        answering(&script, GREETING, &wait);
        self.sshd.authorize(&format!("sh {}", script.display()));
        (script.display().to_string(), go)
    }
}

/// A process that is stopped while this exists: a stopped master would block the test's cleanup.
struct Stopped<'a>(&'a Process);

impl<'a> Stopped<'a> {
    fn new(process: &'a Process) -> Self {
        process.signal(Signal::SIGSTOP).unwrap();
        Self(process)
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        let _ = self.0.signal(Signal::SIGCONT);
    }
}

fn running(script: &str) -> usize {
    processes(&["sh\0", script]).len()
}

fn await_sessions(script: &str, count: usize) {
    eventually("all sessions run", || (running(script) == count).then_some(()));
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn call_leaves_a_master_without_its_descriptors() {
    let Some(pair) = Pair::new() else { return };
    // The answer ends when all three pipes of the call have reached their end.
    pair.director.ok("has_vm", &has_vm());
    let master = pair.master();
    let pid = master.pid();
    assert_eq!(getsid(Some(Pid::from_raw(pid))).unwrap().as_raw(), pid, "a session of its own");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:\t")).unwrap();
    let parent = fs::read_to_string(format!("/proc/{parent}/comm")).unwrap();
    assert!(!parent.contains("bosh-qemu-cpi") && parent.trim() != "ssh", "{parent}");
    assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), Path::new("/"));
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let target = fs::read_link(entry.path()).unwrap().display().to_string();
        // Its log is a file in memory.
        let expected = ["/dev/null", "socket:", "/memfd:log"];
        assert!(expected.iter().any(|start| target.starts_with(start)), "{target}");
    }
    let control_path = pair.director.connections().remove(0);
    assert_eq!(mode(control_path.parent().unwrap()), 0o700);
    assert_eq!(mode(&control_path), 0o600);
    assert!(control_path.as_os_str().len() + 17 <= 107, "{}", control_path.display());
}

#[test]
fn call_with_longest_control_path_shares_the_connection() {
    let Some(pair) = Pair::new() else { return };
    // 107 bytes: 54 here, "/bosh-qemu-cpi-0", "/<16 hex digits>.15" and 17 that ssh appends.
    let rest = 54 - pair.director.path("x").as_os_str().len() + 1;
    let temporary = pair.director.path(&"x".repeat(rest));
    assert_eq!(temporary.as_os_str().len(), 54);
    fs::create_dir(&temporary).unwrap();
    let mut command = pair.director.cpi();
    command.env("TMPDIR", &temporary);
    let request = crate::support::host::request("has_vm", &has_vm());
    let output =
        pair.director.namespace().run(|| crate::support::answer::run(command, request.as_bytes()));
    assert!(String::from_utf8_lossy(&output.stdout).contains("\"result\":false"), "{output:?}");
    let dir = fs::read_dir(temporary.join("bosh-qemu-cpi-0")).unwrap().flatten();
    let sockets =
        dir.map(|entry| entry.path()).filter(|path| path.extension() == Some("0".as_ref()));
    let sockets: Vec<_> = sockets.collect();
    assert_eq!(sockets.len(), 1);
    let exit = std::process::Command::new("ssh")
        .args(["-F", "none", "-O", "exit", "-S"])
        .arg(&sockets[0])
        .arg("nowhere")
        .output();
    assert!(exit.unwrap().status.success());
}

#[test]
fn kill_first_call_keeps_the_connection() {
    let Some(pair) = Pair::new() else { return };
    let (script, go) = pair.hold_answers();
    let mut first = pair.director.start("has_vm", &has_vm());
    await_sessions(&script, 1);
    let second = pair.director.start("has_vm", &has_vm());
    await_sessions(&script, 2);
    first.kill().unwrap();
    first.wait().unwrap();
    fs::write(go, "").unwrap();
    assert_eq!(*answer(second).result(), false);
    assert_eq!(pair.logged_in(), 1);
    assert_eq!(*pair.director.call("has_vm", &has_vm()).result(), false);
    assert_eq!(pair.logged_in(), 1, "the same connection");
}

#[test]
fn call_beside_stopped_master_answers_within_two_seconds() {
    let Some(pair) = Pair::new() else { return };
    let began = Instant::now();
    pair.director.ok("has_vm", &has_vm());
    let first = began.elapsed();
    let master = pair.master();
    let stopped = Stopped::new(&master);
    // The fastest of three: other tests run at the same time.
    let timed = |_| {
        let began = Instant::now();
        let answer = pair.director.call("has_vm", &has_vm());
        assert_eq!(*answer.result(), false);
        assert!(answer.stderr.contains("does not answer: this call connects by itself"));
        began.elapsed()
    };
    let fastest = (0..3).map(timed).min().unwrap();
    // On a busy machine a connection alone takes longer than that.
    let timeout = STOPPED_MASTER_TIMEOUT.max(first + Duration::from_secs(1));
    assert!(fastest < timeout, "{fastest:?}, first call {first:?}");
    drop(stopped);
    pair.director.ok("has_vm", &has_vm());
    assert_eq!((pair.masters().len(), pair.logged_in()), (1, 1), "it is used again");
}

#[test]
fn first_calls_at_once_share_few_connections() {
    let Some(pair) = Pair::new() else { return };
    let (script, go) = pair.hold_answers();
    let calls: Vec<_> = (0..32).map(|_| pair.director.start("has_vm", &has_vm())).collect();
    await_sessions(&script, 32);
    assert_eq!(pair.logged_in(), 4, "ten sessions each");
    fs::write(go, "").unwrap();
    for call in calls {
        assert_eq!(*answer(call).result(), false);
    }
}

#[test]
fn call_with_other_configuration_never_reuses_the_connection() {
    let Some(pair) = Pair::new() else { return };
    pair.director.ok("has_vm", &has_vm());
    let master = pair.master();
    for (key, value, expected) in [
        ("host_key", json!(pair.sshd.read("caller.pub")), "'host_key'"),
        ("private_key", json!(pair.sshd.read("host")), "'private_key'"),
        ("user", json!("no-such-user"), "'private_key'"),
        ("port", json!(2), "connection refused"),
    ] {
        let transport = pair.transport_with(key, &value);
        pair.director.configure(&json!({"transport": transport}));
        let refused = pair.director.call("has_vm", &has_vm());
        assert!(refused.failure().message.contains(expected), "{key}: {refused:?}");
        assert_eq!(pair.master().pid(), master.pid(), "{key}");
    }
}

#[test]
fn connect_with_wrong_host_key_is_refused_on_every_connection() {
    let Some(pair) = Pair::with(&json!({}), "MaxSessions 1") else { return };
    let (script, go) = pair.hold_answers();
    let first = pair.director.start("has_vm", &has_vm());
    await_sessions(&script, 1);
    // The next session of the connection is refused, so ssh opens another connection.
    pair.sshd.change_host_key();
    let refused = pair.director.call("has_vm", &has_vm());
    assert!(refused.failure().message.contains("the host's key is not the one"), "{refused:?}");
    assert_eq!(running(&script), 1);
    fs::write(go, "").unwrap();
    assert_eq!(*answer(first).result(), false);
}
