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

/// The error numbers of the system calls `calls`, in Perl.
fn errors_of(calls: &[&str], keeps_network: bool) -> String {
    let dir = tempfile::tempdir().unwrap();
    let calls: String =
        calls.iter().map(|call| format!("{call}; print 0+$!, qq( ); $! = 0;")).collect();
    let script = format!("exec perl -e '$| = 1; {calls}'");
    let confined = Confined { keeps_network, ..confined(dir.path(), &script, Hardening::Strict) };
    let mut child = spawn(confined).unwrap();
    assert!(child.process().wait_exit(Instant::now() + Duration::from_secs(20)).unwrap());
    child.kill().unwrap();
    std::fs::read_to_string(dir.path().join("log")).unwrap()
}

#[test]
fn spawn_refuses_system_calls_that_qemu_does_not_need() {
    let ioctl = |request: u32| format!("syscall(16, 0, {request}, 0)");
    let calls = [
        "socket($s, 1, 1, 0)",                 // AF_UNIX
        "socket($s, 40, 1, 0)",                // AF_VSOCK
        "socketpair($s, $t, 1, 2, 0)",         // a datagram socket, which could be connected again
        "syscall(321, 0, 0, 0)",               // bpf
        "syscall(298, 0, 0, 0, 0, 0)",         // perf_event_open
        "syscall(248, 0, 0, 0, 0, 0)",         // add_key
        "syscall(250, 0, 0, 0, 0, 0)",         // keyctl
        "syscall(272, 0x10000000)",            // unshare(CLONE_NEWUSER)
        "syscall(56, 0x10000011, 0, 0, 0, 0)", // clone(CLONE_NEWUSER | SIGCHLD)
        &ioctl(0x8924),                        // SIOCSIFHWADDR
        &ioctl(0x4004_54ca),                   // TUNSETIFF
        "syscall(0x40000001, 0, 0, 0)",        // a call of the x32 ABI
    ];
    let expected = "1 ".repeat(calls.len());
    assert_eq!(errors_of(&calls, false), expected);
    // ENOSYS has the C library use clone. TUNSETOFFLOAD of what is no tap, and KVM_RUN, reach the
    // kernel: ENOTTY.
    let allowed = ["syscall(435, 0, 0)", &ioctl(0x4004_54d0), &ioctl(0xae80)];
    assert_eq!(errors_of(&allowed, false), "38 25 25 ");
}

#[test]
fn spawn_with_network_allows_internet_sockets_alone() {
    let calls = ["syscall(41, 2, 1, 0)", "syscall(41, 1, 1, 0)", "syscall(41, 16, 3, 0)"];
    assert_eq!(errors_of(&calls, true), "0 1 1 ");
    assert_eq!(errors_of(&calls[..1], false), "1 ");
}

#[test]
fn spawn_limits_the_threads_of_its_own_user_alone() {
    let limits = |hardening| says("grep processes /proc/self/limits", hardening);
    assert!(limits(Hardening::Strict).contains(" 4096                 4096 "));
    assert!(!limits(Hardening::Off).contains(" 4096 "));
}
