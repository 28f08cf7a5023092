//! Starting one program with as little as it needs, in this order, in the child between fork and exec:
//!
//! 1. take the lock that says it lives ([`super::pidlock`])
//! 2. have every descriptor close at exec but those it is given
//! 3. no core dumps, room for descriptors
//! 4. empty network and ipc namespaces; a QEMU that is to speak to the network itself keeps the host's
//! 5. a uid and gid of its own, no groups
//! 6. no_new_privs, no capabilities, then Landlock: which paths it may open at all
//!
//! Everything that allocates or can fail in words is prepared before the fork; the child makes system calls only.
//! QEMU adds its own seccomp filter (`-sandbox`).

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::Signal;

pub use super::landlock::Paths;
use super::pidfd::{Process, Watch};
use super::{landlock, pidlock};
use crate::config::Hardening;
use crate::crash;
use crate::error::{Error, ErrorKind, Result};

/// Sixteen disks take 50 descriptors; a guest can not make QEMU open more than its hot-plug slots.
const DESCRIPTORS: libc::rlim_t = 4096;
/// 0 would still feed a core to a program in kernel.core_pattern, and a guest's secrets with it; 1 means none at all
/// (fs/coredump.c).
const NO_CORE: libc::rlim_t = 1;
/// A program that ended at once has let go of its lock a little before its end is seen.
const EXIT_DETECT_TIMEOUT: Duration = Duration::from_secs(1);

/// A program and what it may do.
#[derive(Debug)]
pub struct Confined {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Descriptors it inherits under their numbers; closed here once it runs.
    pub inherit: Vec<OwnedFd>,
    /// Its user and group.
    pub uid: u32,
    /// Whether it keeps the network namespace it is started in: it speaks to the network itself.
    pub keeps_network: bool,
    /// Paths it may open.
    pub paths: Paths,
    /// Where its standard output and error go.
    pub log: File,
    /// The file it locks while it lives, from [`pidlock::open`]. No other descriptor of it may be open in this process:
    /// the child's copy would be closed at exec, and the lock go with it.
    pub pid_lock: File,
    /// Whether a step the host can not do is an error.
    pub hardening: Hardening,
}

/// The steps in the child, by the number it reports them under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Step {
    Lock = 1,
    CloseOthers,
    Inherit,
    Limits,
    Namespaces,
    Groups,
    Gid,
    Uid,
    NoNewPrivileges,
    Capabilities,
    Landlock,
}

impl Step {
    const ALL: [Step; 11] = [
        Self::Lock,
        Self::CloseOthers,
        Self::Inherit,
        Self::Limits,
        Self::Namespaces,
        Self::Groups,
        Self::Gid,
        Self::Uid,
        Self::NoNewPrivileges,
        Self::Capabilities,
        Self::Landlock,
    ];

    fn describe(self) -> &'static str {
        match self {
            Self::Lock => "lock its pid file (is it running already?)",
            Self::CloseOthers => "keep our other descriptors from it (needs Linux 5.11)",
            Self::Inherit => "hand over its descriptors",
            Self::Limits => "set its resource limits",
            Self::Namespaces => "give it empty network and ipc namespaces",
            Self::Groups => "drop supplementary groups",
            Self::Gid => "drop to its own group",
            Self::Uid => "drop to its own user",
            Self::NoNewPrivileges => "forbid it new privileges",
            Self::Capabilities => "drop its capabilities",
            Self::Landlock => "restrict it to its paths with Landlock",
        }
    }

    /// Whether the program can run without it. A lock or descriptor is no hardening.
    fn is_optional(self) -> bool {
        !matches!(self, Self::Lock | Self::Inherit | Self::Limits)
    }
}

/// Starts the program. Returns once it is executing.
///
/// # Errors
/// [`ErrorKind::Host`] naming the step that failed.
pub fn spawn(confined: Confined) -> Result<Child> {
    let Confined { program, args, inherit, uid, keeps_network, paths, log, pid_lock, hardening } =
        confined;
    let ruleset = landlock::ruleset(&paths, hardening)?;
    let (mut failed_at, report) = std::io::pipe().map_err(|e| Error::os("make a pipe", e))?;
    let errors = log.try_clone().map_err(|e| Error::os("copy the log's descriptor", e))?;
    let mut command = Command::new(&program);
    command.args(&args).stdin(Stdio::null()).stdout(log).stderr(errors).process_group(0);
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").current_dir("/");
    let fds: Vec<RawFd> =
        inherit.iter().map(AsRawFd::as_raw_fd).chain([pid_lock.as_raw_fd()]).collect();
    // Only root with CAP_SYS_RESOURCE may raise a hard limit; a container's root has not.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)
        .map_err(|e| Error::os("ask for the limit of descriptors", e))?;
    let steps = Steps {
        fds,
        descriptors: DESCRIPTORS.min(most),
        lock: pid_lock.as_raw_fd(),
        uid,
        namespaces: if keeps_network {
            libc::CLONE_NEWIPC
        } else {
            libc::CLONE_NEWNET | libc::CLONE_NEWIPC
        },
        ruleset: ruleset.as_ref().map(AsRawFd::as_raw_fd),
        hardening,
        report: report.as_raw_fd(),
    };
    before_exec(&mut command, steps);
    let spawned = command.spawn();
    drop((report, inherit));
    let mut steps = Vec::new();
    failed_at.read_to_end(&mut steps).map_err(|e| Error::os("read how the start went", e))?;
    let steps: Vec<_> =
        steps.iter().filter_map(|n| Step::ALL.into_iter().find(|s| *s as u8 == *n)).collect();
    let child = spawned.map_err(|error| match steps.last() {
        Some(step) => {
            Error::os(format!("start '{}': {}", program.display(), step.describe()), error).hint(
                "the configuration's `hardening` can be `best-effort` where a host can not do this",
            )
        }
        None => Error::io("start", &program, error),
    })?;
    for step in steps {
        tracing::warn!(step = step.describe(), "this host can not confine QEMU fully");
    }
    let child = into_child(child, &pid_lock)?;
    crash::point!("qemu spawned");
    Ok(child)
}

/// The started program as a [`Child`] that holds its lock. If it can not be one it is killed: an error means that nothing runs.
fn into_child(mut child: std::process::Child, pid_lock: &File) -> Result<Child> {
    let process = Process::open(child.id() as i32).and_then(|process| {
        let locked = pidlock::is_held_by(pid_lock, process.pid())?
            || process.wait_exit(Instant::now() + EXIT_DETECT_TIMEOUT)?;
        if locked {
            Ok(process)
        } else {
            Err(Error::new(ErrorKind::Internal, "a started program lost the lock on its pid file"))
        }
    });
    match process {
        Ok(process) => Ok(Child { child, process, watch: None }),
        Err(error) => {
            let _ = child.kill().and_then(|()| child.wait());
            Err(error)
        }
    }
}

/// What the child needs; no heap is touched after the fork.
struct Steps {
    fds: Vec<RawFd>,
    lock: RawFd,
    uid: u32,
    namespaces: libc::c_int,
    descriptors: libc::rlim_t,
    ruleset: Option<RawFd>,
    hardening: Hardening,
    report: RawFd,
}

#[allow(unsafe_code)]
fn before_exec(command: &mut Command, steps: Steps) {
    // SAFETY: between fork and exec only async-signal-safe calls are allowed. `run` makes raw system calls on numbers
    // and on memory that was filled before; it neither allocates nor locks.
    unsafe { command.pre_exec(move || steps.run()) };
}

impl Steps {
    #[allow(unsafe_code)]
    fn run(&self) -> std::io::Result<()> {
        // SAFETY: below are numbers, and the address of a lock that the kernel reads while it lives.
        let call = |number, arguments| unsafe { call(number, arguments) };
        self.step(Step::Lock, || {
            let lock = pidlock::whole_file(libc::F_WRLCK);
            call(
                libc::SYS_fcntl,
                [self.lock as usize, libc::F_SETLK as usize, &raw const lock as usize],
            )
        })?;
        let close_at_exec = libc::CLOSE_RANGE_CLOEXEC as usize;
        self.step(Step::CloseOthers, || {
            call(libc::SYS_close_range, [3, u32::MAX as usize, close_at_exec])
        })?;
        for fd in &self.fds {
            self.step(Step::Inherit, || {
                call(libc::SYS_fcntl, [*fd as usize, libc::F_SETFD as usize, 0])
            })?;
        }
        self.step(Step::Limits, || limits(self.descriptors))?;
        if self.hardening == Hardening::Off {
            return Ok(());
        }
        let id = self.uid as usize;
        self.step(Step::Namespaces, || call(libc::SYS_unshare, [self.namespaces as usize, 0, 0]))?;
        self.step(Step::Groups, || call(libc::SYS_setgroups, [0, 0, 0]))?;
        self.step(Step::Gid, || call(libc::SYS_setresgid, [id, id, id]))?;
        self.step(Step::Uid, || call(libc::SYS_setresuid, [id, id, id]))?;
        self.step(Step::NoNewPrivileges, || {
            call(libc::SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS as usize, 1, 0])
        })?;
        self.step(Step::Capabilities, drop_capabilities)?;
        if let Some(ruleset) = self.ruleset {
            self.step(Step::Landlock, || {
                call(libc::SYS_landlock_restrict_self, [ruleset as usize, 0, 0])
            })?;
        }
        Ok(())
    }

    /// Does one step; a failure is reported by number and, if it must not be, returned.
    #[allow(unsafe_code)]
    fn step(&self, step: Step, act: impl FnOnce() -> std::io::Result<()>) -> std::io::Result<()> {
        let Err(error) = act() else { return Ok(()) };
        let number = step as u8;
        // SAFETY: the kernel reads one byte, which lives.
        let _ =
            unsafe { call(libc::SYS_write, [self.report as usize, &raw const number as usize, 1]) };
        if step.is_optional() && self.hardening != Hardening::Strict { Ok(()) } else { Err(error) }
    }
}

#[allow(unsafe_code)]
fn limits(descriptors: libc::rlim_t) -> std::io::Result<()> {
    for (resource, limit) in [(libc::RLIMIT_CORE, NO_CORE), (libc::RLIMIT_NOFILE, descriptors)] {
        let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
        // SAFETY: the kernel reads the limit, which lives.
        unsafe { call(libc::SYS_setrlimit, [resource as usize, &raw const limit as usize, 0]) }?;
    }
    Ok(())
}

/// Root keeps its capabilities if the host can not give it another user, and a starter's ambient ones outlive any change
/// of user. After this, and with no_new_privs, exec gives nothing back (capabilities(7)).
fn drop_capabilities() -> std::io::Result<()> {
    set_capabilities(&[0; 6])
}

/// The effective, permitted and inheritable sets of this thread: their low 32 bits, then their high ones.
#[allow(unsafe_code)]
fn set_capabilities(sets: &[u32; 6]) -> std::io::Result<()> {
    const LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;
    let header = [LINUX_CAPABILITY_VERSION_3, 0];
    // SAFETY: the kernel reads a header and the two sets of three words that its version has (capset(2)); they live.
    unsafe { call(libc::SYS_capset, [&raw const header as usize, sets.as_ptr() as usize, 0]) }
}

/// A system call of up to three arguments, without the C library's bookkeeping for threads, which the child of a fork
/// must not enter.
///
/// # Safety
/// Each argument is a number, or the address of what the system call may read, and only read, until it returns.
#[allow(unsafe_code)]
unsafe fn call(number: libc::c_long, arguments: [usize; 3]) -> std::io::Result<()> {
    let [a, b, c] = arguments;
    // SAFETY: as the caller promises. prctl's two unused arguments are zero as it demands.
    let result = unsafe { libc::syscall(number, a, b, c, 0usize, 0usize) };
    if result == -1 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// A confined program that was started by this process.
#[derive(Debug)]
pub struct Child {
    child: std::process::Child,
    process: Process,
    /// Registered with the event loop at the first wait.
    watch: Option<Watch>,
}

impl Child {
    /// Its process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Waits for its end and reaps it. May be dropped and called again.
    pub async fn exited(&mut self) -> Result<ExitStatus> {
        if self.watch.is_none() {
            self.watch = Some(Watch::new(&self.process)?);
        }
        if let Some(watch) = &self.watch {
            watch.ended().await?;
        }
        self.child.wait().map_err(|e| Error::os(format!("reap process {}", self.process.pid()), e))
    }

    /// Kills and reaps it.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.process.signal(Signal::SIGKILL)?;
        self.child.wait().map_err(|e| Error::os(format!("reap process {}", self.process.pid()), e))
    }
}

#[cfg(test)]
mod tests {
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
    fn a_confined_program_is_nobody_and_sees_nothing() {
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
    fn a_host_that_can_not_drop_the_user_still_drops_every_capability() {
        // Capabilities belong to a thread and are inherited by what it starts: a root that may not change its user.
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
        for line in [
            "Uid:\t0\t0",
            "CapPrm:\t0000000000000000",
            "CapEff:\t0000000000000000",
            "NoNewPrivs:\t1",
        ] {
            assert!(status.contains(line), "{line} in {status}");
        }
    }

    #[test]
    fn what_it_is_not_given_it_does_not_get() {
        let stray = File::open("/dev/null").unwrap();
        nix::fcntl::fcntl(&stray, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))
            .unwrap();
        let script = format!("test -e /proc/self/fd/{} && echo stray", stray.as_raw_fd());
        assert_eq!(says(&script, Hardening::Strict), "");
        assert_eq!(says(&script, Hardening::Off), "");
    }

    #[test]
    fn a_lock_that_is_lost_at_exec_is_an_error_and_ends_the_program() {
        let dir = tempfile::tempdir().unwrap();
        let confined = confined(dir.path(), "exec sleep 60", Hardening::Strict);
        // The child closes its copy of this at exec, and POSIX locks go with any descriptor of the file.
        let _second = pidlock::open(&dir.path().join("x.pid")).unwrap();
        let error = spawn(confined).unwrap_err();
        assert!(error.report().contains("lost the lock"), "{}", error.report());
    }

    #[test]
    fn no_core_is_dumped_into_a_file_or_a_program() {
        assert!(
            says("grep core /proc/self/limits", Hardening::Strict)
                .contains(" 1                    1 ")
        );
    }

    #[test]
    fn without_hardening_it_is_plain() {
        assert!(says("cat /proc/self/status", Hardening::Off).contains("NoNewPrivs:\t0"));
    }

    #[test]
    fn it_holds_its_lock_until_it_is_killed_and_keeps_what_it_inherits() {
        let dir = tempfile::tempdir().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let fd = OwnedFd::from(writer);
        let number = fd.as_raw_fd();
        let confined_sleep = confined(dir.path(), "exec sleep 60", Hardening::Strict);
        let mut child = spawn(Confined { inherit: vec![fd], ..confined_sleep }).unwrap();
        // Both ends of a pipe read as the same "pipe:[inode]".
        let target =
            |pid: i32, fd: RawFd| std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
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
    fn a_missing_program_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let missing = Confined {
            program: "/nonexistent".into(),
            ..confined(dir.path(), "", Hardening::Strict)
        };
        assert!(spawn(missing).unwrap_err().report().starts_with("start '/nonexistent'"));
    }
}
