//! Confinement: starts one program with minimal privileges. The child takes these steps between
//! fork and exec:
//!
//! 1. lock the pid file ([`super::pidlock`])
//! 2. mark every descriptor close-on-exec, except the inherited ones
//! 3. set its resource limits ([`super::limits`])
//! 4. enter empty network and ipc namespaces; with `keeps_network`, only ipc
//! 5. set its own uid and gid, drop all groups, limit its threads
//! 6. set no_new_privs, drop all capabilities, then restrict paths with Landlock and system calls
//!    with a filter (`seccomp`)
//!
//! Everything that allocates, or whose errors need a message, is prepared before the fork. The
//! child only makes system calls. QEMU adds a seccomp filter of its own (`-sandbox`).

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::signal::Signal;

pub use super::landlock::Paths;
use super::pidfd::{Process, Watch};
use super::seccomp::Filter;
use super::{landlock, limits, pidlock};
use crate::config::Hardening;
use crate::crash;
use crate::error::{Error, ErrorKind, Result};

/// Limit of threads of the program's uid, for hosts without control groups. Four times that of a
/// VM's control group, because a VM of another state directory may have the same uid.
const THREADS: libc::rlim_t = 4096;
/// How long to wait for the end of a program without its lock: a program that ends releases its
/// lock a moment before its pidfd reports the end.
const EXIT_DETECT_TIMEOUT: Duration = Duration::from_secs(1);

/// A program with its confinement.
#[derive(Debug)]
pub struct Confined {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Descriptors that it inherits under the same numbers. This process closes them once the
    /// program runs.
    pub inherit: Vec<OwnedFd>,
    /// Its uid, which is also its gid.
    pub uid: u32,
    /// Whether it stays in this process's network namespace, because it uses the network itself.
    pub keeps_network: bool,
    /// The paths it may open.
    pub paths: Paths,
    /// The file for its standard output and standard error.
    pub log: File,
    /// The file that it keeps locked until it ends, from [`pidlock::open`]. This process must not
    /// have another descriptor of that file open. The child would close its copy at exec, which
    /// releases the lock.
    pub pid_lock: File,
    /// Whether a step that the host does not support is an error.
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
    Threads,
    NoNewPrivileges,
    Capabilities,
    Landlock,
    SystemCalls,
}

impl Step {
    const ALL: [Step; 13] = [
        Self::Lock,
        Self::CloseOthers,
        Self::Inherit,
        Self::Limits,
        Self::Namespaces,
        Self::Groups,
        Self::Gid,
        Self::Uid,
        Self::Threads,
        Self::NoNewPrivileges,
        Self::Capabilities,
        Self::Landlock,
        Self::SystemCalls,
    ];

    fn describe(self) -> &'static str {
        match self {
            Self::Lock => "lock its pid file (is it running already?)",
            Self::CloseOthers => "close all other descriptors (needs Linux 5.11)",
            Self::Inherit => "inherit its descriptors",
            Self::Limits => "set its resource limits",
            Self::Namespaces => "enter empty network and ipc namespaces",
            Self::Groups => "drop supplementary groups",
            Self::Gid => "drop to its own group",
            Self::Uid => "drop to its own user",
            Self::Threads => "limit its threads",
            Self::NoNewPrivileges => "set no_new_privs",
            Self::Capabilities => "drop its capabilities",
            Self::Landlock => "restrict it to its paths with Landlock",
            Self::SystemCalls => "restrict its system calls with seccomp",
        }
    }

    /// Returns whether the program can run without this step. The lock, the descriptors and the
    /// limits are not hardening.
    fn is_optional(self) -> bool {
        !matches!(self, Self::Lock | Self::Inherit | Self::Limits)
    }
}

/// Starts the program and returns once it is executing.
///
/// # Errors
/// [`ErrorKind::Host`] naming the step that failed. No process remains then.
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
    let steps = Steps {
        fds,
        lock: pid_lock.as_raw_fd(),
        uid,
        namespaces: if keeps_network {
            libc::CLONE_NEWIPC
        } else {
            libc::CLONE_NEWNET | libc::CLONE_NEWIPC
        },
        ruleset: ruleset.as_ref().map(AsRawFd::as_raw_fd),
        filter: Filter::new(keeps_network),
        hardening,
        report: report.as_raw_fd(),
    };
    before_exec(&mut command, steps);
    let spawned = command.spawn();
    drop((report, inherit));
    let mut steps = Vec::new();
    failed_at.read_to_end(&mut steps).map_err(|e| Error::os("read the steps that failed", e))?;
    let steps: Vec<_> =
        steps.iter().filter_map(|n| Step::ALL.into_iter().find(|s| *s as u8 == *n)).collect();
    let child = spawned.map_err(|error| match steps.last() {
        Some(step) => {
            Error::os(format!("start '{}': {}", program.display(), step.describe()), error)
                .hint("if the host does not support this, set `hardening` to `best-effort`")
        }
        None => Error::io("start", &program, error),
    })?;
    for step in steps {
        tracing::warn!(step = step.describe(), "this host cannot confine QEMU fully");
    }
    let child = into_child(child, &pid_lock)?;
    crash::point!("qemu spawned");
    Ok(child)
}

/// Returns the started program as a [`Child`], after checking that it holds its lock. On error the
/// program is killed.
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

/// Everything that the child needs. It uses no heap after the fork.
struct Steps {
    fds: Vec<RawFd>,
    lock: RawFd,
    uid: u32,
    namespaces: libc::c_int,
    ruleset: Option<RawFd>,
    filter: Filter,
    hardening: Hardening,
    report: RawFd,
}

#[allow(unsafe_code)]
fn before_exec(command: &mut Command, steps: Steps) {
    // SAFETY: between fork and exec only async-signal-safe calls are allowed. `run` makes raw
    // system calls with numbers and with memory prepared before the fork. It neither allocates nor
    // locks.
    unsafe { command.pre_exec(move || steps.run()) };
}

impl Steps {
    #[allow(unsafe_code)]
    fn run(&self) -> std::io::Result<()> {
        // SAFETY: the arguments below are numbers, and the address of a lock that lives during its
        // call and is only read.
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
        self.step(Step::Limits, limits::set_all)?;
        if self.hardening == Hardening::Off {
            return Ok(());
        }
        let id = self.uid as usize;
        self.step(Step::Namespaces, || call(libc::SYS_unshare, [self.namespaces as usize, 0, 0]))?;
        self.step(Step::Groups, || call(libc::SYS_setgroups, [0, 0, 0]))?;
        self.step(Step::Gid, || call(libc::SYS_setresgid, [id, id, id]))?;
        let mut has_own_uid = false;
        self.step(Step::Uid, || {
            call(libc::SYS_setresuid, [id, id, id]).inspect(|()| has_own_uid = true)
        })?;
        // The host's processes of another uid would count.
        if has_own_uid {
            self.step(Step::Threads, || limits::set(libc::RLIMIT_NPROC, THREADS))?;
        }
        self.step(Step::NoNewPrivileges, || {
            call(libc::SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS as usize, 1, 0])
        })?;
        self.step(Step::Capabilities, drop_capabilities)?;
        if let Some(ruleset) = self.ruleset {
            self.step(Step::Landlock, || {
                call(libc::SYS_landlock_restrict_self, [ruleset as usize, 0, 0])
            })?;
        }
        self.step(Step::SystemCalls, || self.filter.install())
    }

    /// Takes one step. A failure is reported by the step's number, and returned unless the step is
    /// optional.
    #[allow(unsafe_code)]
    fn step(&self, step: Step, act: impl FnOnce() -> std::io::Result<()>) -> std::io::Result<()> {
        let Err(error) = act() else { return Ok(()) };
        let number = step as u8;
        // SAFETY: the kernel reads one byte of a local variable.
        let _ =
            unsafe { call(libc::SYS_write, [self.report as usize, &raw const number as usize, 1]) };
        if step.is_optional() && self.hardening != Hardening::Strict { Ok(()) } else { Err(error) }
    }
}

/// Drops all capabilities. Root keeps its own where the host does not allow another uid, and
/// inherited ambient capabilities survive a change of uid. After this, with no_new_privs, exec
/// grants none (capabilities(7)).
fn drop_capabilities() -> std::io::Result<()> {
    set_capabilities(&[0; 6])
}

/// Sets the effective, permitted and inheritable capabilities of this thread: first their low 32
/// bits, then their high 32 bits.
#[allow(unsafe_code)]
fn set_capabilities(sets: &[u32; 6]) -> std::io::Result<()> {
    const LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;
    let header = [LINUX_CAPABILITY_VERSION_3, 0];
    // SAFETY: the kernel reads a header and two sets of three words, as version 3 has (capset(2));
    // both are live.
    unsafe { call(libc::SYS_capset, [&raw const header as usize, sets.as_ptr() as usize, 0]) }
}

/// Makes a system call of up to three arguments. It avoids the C library's wrappers, whose thread
/// bookkeeping must not run in the child of a fork.
///
/// # Safety
/// Each argument must be a number, or the address of memory that the system call may read, and only
/// reads, until it returns.
#[allow(unsafe_code)]
unsafe fn call(number: libc::c_long, arguments: [usize; 3]) -> std::io::Result<()> {
    let [a, b, c] = arguments;
    // SAFETY: the caller guarantees it. The two unused arguments of prctl are zero, as it requires.
    let result = unsafe { libc::syscall(number, a, b, c, 0usize, 0usize) };
    if result == -1 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// A confined program that was started by this process.
#[derive(Debug)]
pub struct Child {
    child: std::process::Child,
    process: Process,
    /// Registered with the event loop at the first wait for the exit.
    watch: Option<Watch>,
}

impl Child {
    /// Returns the process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Waits for the end of the program and reaps it. The future may be dropped and made again.
    pub async fn exited(&mut self) -> Result<ExitStatus> {
        if self.watch.is_none() {
            self.watch = Some(Watch::new(&self.process)?);
        }
        if let Some(watch) = &self.watch {
            watch.ended().await?;
        }
        self.child.wait().map_err(|e| Error::os(format!("reap process {}", self.process.pid()), e))
    }

    /// Kills and reaps the program.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.process.signal(Signal::SIGKILL)?;
        self.child.wait().map_err(|e| Error::os(format!("reap process {}", self.process.pid()), e))
    }
}

#[cfg(test)]
mod tests;
