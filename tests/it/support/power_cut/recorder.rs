//! Traces the system calls of a call with ptrace(2), with its threads and the programs it starts.
//! So the code under test reports nothing, and a forgotten fsync is not taken for done.
//!
//! QEMU and the supervisor are not traced: a guest makes its own writes durable.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::Arc;

use nix::errno::Errno;
use nix::libc::{self, c_int, c_long, user_regs_struct};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::Step;

/// Value of `rax` at the entry of a system call (x86-64).
const AT_ENTRY: u64 = -(libc::ENOSYS as i64) as u64;

/// Runs `command` with `input` on stdin and records the steps it does in `root`, a path without
/// symbolic links.
#[expect(clippy::zombie_processes, reason = "the tracer waits for every traced process")]
pub fn record(mut command: Command, input: &[u8], root: &Path) -> (Output, Vec<Step>) {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("spawn");
    let pid = Pid::from_raw(child.id().try_into().expect("a pid"));
    // The process waits for its request and has done nothing yet.
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACEEXEC;
    ptrace::seize(pid, options).and_then(|()| ptrace::interrupt(pid)).expect("ptrace");
    child.stdin.take().unwrap().write_all(input).unwrap();
    let mut recorder = Recorder { root, steps: Vec::new(), traced: BTreeMap::from([(pid, None)]) };
    let status = recorder.trace(pid);
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    child.stdout.take().unwrap().read_to_end(&mut stdout).unwrap();
    child.stderr.take().unwrap().read_to_end(&mut stderr).unwrap();
    (Output { status, stdout, stderr }, recorder.steps)
}

struct Recorder<'a> {
    root: &'a Path,
    steps: Vec<Step>,
    /// Every traced thread, with the step of its current system call if that succeeds.
    traced: BTreeMap<Pid, Option<Step>>,
}

impl Recorder<'_> {
    /// Traces until no thread is left. Returns the exit status of `first`.
    fn trace(&mut self, first: Pid) -> ExitStatus {
        let mut ended = None;
        while !self.traced.is_empty() {
            // `__WNOTHREAD`: children of other tests' threads are not reaped.
            let status = waitpid(None, Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD))
                .expect("waitpid");
            let pid = status.pid().expect("a pid");
            let mut signal = None;
            match status {
                WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {
                    self.traced.remove(&pid);
                    if pid == first {
                        ended = Some(match status {
                            WaitStatus::Exited(_, code) => ExitStatus::from_raw(code << 8),
                            WaitStatus::Signaled(_, signal, _) => {
                                ExitStatus::from_raw(signal as i32)
                            }
                            _ => unreachable!(),
                        });
                    }
                    continue;
                }
                WaitStatus::PtraceSyscall(_) => self.system_call(pid),
                WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_EXEC)
                    if is_supervisor_or_qemu(pid) =>
                {
                    ptrace::detach(pid, None).expect("detach");
                    self.traced.remove(&pid);
                    continue;
                }
                WaitStatus::Stopped(_, other) if other != Signal::SIGTRAP => signal = Some(other),
                _ => {}
            }
            self.traced.entry(pid).or_default();
            match ptrace::syscall(pid, signal) {
                // The thread was killed meanwhile. `waitpid` reports its end.
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => panic!("ptrace: {errno}"),
            }
        }
        ended.expect("the call ended")
    }

    fn system_call(&mut self, pid: Pid) {
        let Ok(registers) = ptrace::getregs(pid) else { return };
        if registers.rax == AT_ENTRY {
            let step = Call { pid, root: self.root, registers }.step();
            self.traced.insert(pid, step);
        } else if let Some(step) = self.traced.insert(pid, None).flatten()
            && registers.rax.cast_signed() >= 0
        {
            self.steps.push(match step {
                Step::Sync(path, _) => {
                    let content = fs::read(self.root.join(&path)).expect("the file that is synced");
                    Step::Sync(path, Arc::new(content))
                }
                step => step,
            });
        }
    }
}

/// Whether the process has just executed the supervisor or QEMU.
fn is_supervisor_or_qemu(pid: Pid) -> bool {
    let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut words = words.split(|byte| *byte == 0);
    let program = words.next().unwrap_or_default();
    program.windows(11).any(|window| window == b"qemu-system") || words.next() == Some(b"supervise")
}

/// A system call at its entry.
struct Call<'a> {
    pid: Pid,
    root: &'a Path,
    registers: user_regs_struct,
}

impl Call<'_> {
    /// The step that it does in the recorded directory, if any.
    fn step(&self) -> Option<Step> {
        let number = c_long::try_from(self.registers.orig_rax).ok()?;
        Some(match number {
            libc::SYS_open => return self.open(self.path(None, 0)?, self.argument(1)),
            libc::SYS_openat => return self.open(self.path(Some(0), 1)?, self.argument(2)),
            libc::SYS_creat => {
                return self.open(self.path(None, 0)?, (libc::O_CREAT | libc::O_TRUNC) as u64);
            }
            libc::SYS_mkdir => Step::MakeDir(self.path(None, 0)?),
            libc::SYS_mkdirat => Step::MakeDir(self.path(Some(0), 1)?),
            libc::SYS_symlink => Step::Symlink(self.text(0)?, self.path(None, 1)?),
            libc::SYS_symlinkat => Step::Symlink(self.text(0)?, self.path(Some(1), 2)?),
            libc::SYS_link => Step::Link(self.path(None, 0)?, self.path(None, 1)?),
            libc::SYS_linkat => Step::Link(self.path(Some(0), 1)?, self.path(Some(2), 3)?),
            libc::SYS_rename => Step::Rename(self.path(None, 0)?, self.path(None, 1)?),
            libc::SYS_renameat | libc::SYS_renameat2 => {
                Step::Rename(self.path(Some(0), 1)?, self.path(Some(2), 3)?)
            }
            libc::SYS_unlink | libc::SYS_rmdir => Step::Remove(self.path(None, 0)?),
            libc::SYS_unlinkat => Step::Remove(self.path(Some(0), 1)?),
            libc::SYS_write
            | libc::SYS_writev
            | libc::SYS_pwrite64
            | libc::SYS_pwritev
            | libc::SYS_pwritev2
            | libc::SYS_ftruncate
            | libc::SYS_fallocate
            | libc::SYS_sendfile => Step::Write(self.file(0)?),
            libc::SYS_copy_file_range => Step::Write(self.file(2)?),
            libc::SYS_ioctl if [libc::FICLONE, libc::FICLONERANGE].contains(&self.argument(1)) => {
                Step::Write(self.file(0)?)
            }
            libc::SYS_truncate => Step::Write(self.path(None, 0)?),
            libc::SYS_fsync | libc::SYS_fdatasync => {
                let path = self.file(0)?;
                if self.root.join(&path).is_dir() {
                    Step::SyncDir(path)
                } else {
                    Step::Sync(path, Arc::default())
                }
            }
            _ => return None,
        })
    }

    fn open(&self, path: PathBuf, flags: u64) -> Option<Step> {
        let has = |flag: c_int| flags & flag as u64 != 0;
        match self.root.join(&path).symlink_metadata() {
            Ok(meta) if has(libc::O_TRUNC) && meta.is_file() => Some(Step::Write(path)),
            Err(_) if has(libc::O_CREAT) => Some(Step::Create(path)),
            _ => None,
        }
    }

    fn argument(&self, index: usize) -> u64 {
        let r = &self.registers;
        [r.rdi, r.rsi, r.rdx, r.r10][index]
    }

    /// The path in argument `index`, resolved from the directory in argument `directory` or the
    /// working directory. `None` if it is outside the recorded directory.
    fn path(&self, directory: Option<usize>, index: usize) -> Option<PathBuf> {
        let text = self.text(index)?;
        let from = match directory.map(|index| self.argument(index) as i32) {
            Some(fd) if fd != libc::AT_FDCWD => {
                fs::read_link(format!("/proc/{}/fd/{fd}", self.pid)).ok()?
            }
            _ => fs::read_link(format!("/proc/{}/cwd", self.pid)).ok()?,
        };
        let path: PathBuf =
            from.join(text).components().filter(|part| *part != Component::CurDir).collect();
        path.strip_prefix(self.root).ok().map(Path::to_owned)
    }

    /// The path of the descriptor in argument `index`. `None` if it is outside the recorded
    /// directory or unlinked.
    fn file(&self, index: usize) -> Option<PathBuf> {
        let path =
            fs::read_link(format!("/proc/{}/fd/{}", self.pid, self.argument(index) as i32)).ok()?;
        let path = path.strip_prefix(self.root).ok().map(Path::to_owned)?;
        self.root.join(&path).symlink_metadata().is_ok().then_some(path)
    }

    fn text(&self, index: usize) -> Option<PathBuf> {
        let memory = File::open(format!("/proc/{}/mem", self.pid)).ok()?;
        let mut text = Vec::new();
        let mut byte = [0];
        while memory.read_at(&mut byte, self.argument(index) + text.len() as u64).ok()? == 1
            && byte[0] != 0
        {
            text.push(byte[0]);
        }
        String::from_utf8(text).ok().map(PathBuf::from)
    }
}
