use std::path::Path;

use super::*;

fn confined(dir: &Path, script: &str, hardening: Hardening) -> Confined {
    Confined {
        program: "/bin/sh".into(),
        args: vec!["-c".into(), script.into()],
        inherit: Vec::new(),
        uid: 1_900_000_001,
        keeps_network: false,
        paths: Paths::of_qemu(Path::new("/usr/bin/qemu-system-x86_64")),
        log: File::create(dir.join("log")).unwrap(),
        pid_lock: pidlock::open(&dir.join("x.pid")).unwrap(),
        hardening,
    }
}

fn says(script: &str, hardening: Hardening) -> String {
    let dir = tempfile::tempdir().unwrap();
    let child = spawn(confined(dir.path(), script, hardening)).unwrap();
    assert!(child.process().wait_exit(Instant::now() + Duration::from_secs(20)).unwrap());
    let mut child = child;
    child.kill().unwrap();
    std::fs::read_to_string(dir.path().join("log")).unwrap()
}

#[test]
fn spawn_drops_user_network_and_paths() {
    let status = says(
        "cat /proc/self/status; cat /proc/net/dev; cat /etc/passwd; : >/tmp/x",
        Hardening::Strict,
    );
    for line in [
        "Uid:\t1900000001\t1900000001",
        "CapEff:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Groups:\t \n",
    ] {
        assert!(status.contains(line), "{line} in {status}");
    }
    assert!(!status.contains("eth0:"), "{status}");
    assert!(status.contains("/etc/passwd: Permission denied"), "{status}");
    assert!(status.contains("/tmp/x: Permission denied"), "{status}");
}

#[test]
fn spawn_by_a_root_that_cannot_change_its_uid_drops_every_capability() {
    // Capabilities belong to a thread, and the programs it starts inherit them.
    let status = std::thread::spawn(|| {
        let own = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let permitted = own.lines().find_map(|line| line.strip_prefix("CapPrm:\t")).unwrap();
        let (cap_setgid, cap_setuid) = (1 << 6, 1 << 7);
        let all = u64::from_str_radix(permitted, 16).unwrap() & !(cap_setgid | cap_setuid);
        let (low, high) = (all as u32, (all >> 32) as u32);
        set_capabilities(&[low, low, 0, high, high, 0]).unwrap();
        says("cat /proc/self/status", Hardening::BestEffort)
    });
    let status = status.join().unwrap();
    for line in
        ["Uid:\t0\t0", "CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"]
    {
        assert!(status.contains(line), "{line} in {status}");
    }
}

#[test]
fn spawn_closes_descriptors_that_are_not_inherited() {
    let stray = File::open("/dev/null").unwrap();
    nix::fcntl::fcntl(&stray, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    let script = format!("test -e /proc/self/fd/{} && echo stray", stray.as_raw_fd());
    assert_eq!(says(&script, Hardening::Strict), "");
    assert_eq!(says(&script, Hardening::Off), "");
}

#[test]
fn spawn_that_loses_the_lock_at_exec_fails_and_kills_the_program() {
    let dir = tempfile::tempdir().unwrap();
    let confined = confined(dir.path(), "exec sleep 60", Hardening::Strict);
    // The child closes its copy of this descriptor at exec, which releases the POSIX lock.
    let _second = pidlock::open(&dir.path().join("x.pid")).unwrap();
    let error = spawn(confined).unwrap_err();
    assert!(error.report().contains("lost the lock"), "{}", error.report());
}

#[test]
fn spawn_forbids_core_dumps() {
    assert!(
        says("grep core /proc/self/limits", Hardening::Strict).contains(" 1                    1 ")
    );
}

#[test]
fn spawn_without_hardening_keeps_privileges() {
    assert!(says("cat /proc/self/status", Hardening::Off).contains("NoNewPrivs:\t0"));
}

#[test]
fn spawn_keeps_lock_and_inherited_descriptors() {
    let dir = tempfile::tempdir().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    let fd = OwnedFd::from(writer);
    let number = fd.as_raw_fd();
    let confined_sleep = confined(dir.path(), "exec sleep 60", Hardening::Strict);
    let mut child = spawn(Confined { inherit: vec![fd], ..confined_sleep }).unwrap();
    // Both ends of a pipe read as the same "pipe:[inode]".
    let target = |pid: i32, fd: RawFd| std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
    let own_end = target(std::process::id() as i32, reader.as_raw_fd());
    assert_eq!(target(child.process().pid(), number), own_end, "under its own number");
    let holder = pidlock::holder(&dir.path().join("x.pid")).unwrap().expect("alive");
    assert_eq!(holder.pid(), child.process().pid());
    let again = spawn(confined(dir.path(), "true", Hardening::Strict)).unwrap_err();
    assert!(again.report().contains("is it running already?"), "{}", again.report());
    child.kill().unwrap();
    assert!(pidlock::holder(&dir.path().join("x.pid")).unwrap().is_none());
}

#[test]
fn spawn_of_a_missing_program_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let missing =
        Confined { program: "/nonexistent".into(), ..confined(dir.path(), "", Hardening::Strict) };
    assert!(spawn(missing).unwrap_err().report().starts_with("start '/nonexistent'"));
}
