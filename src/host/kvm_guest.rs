//! The guest of the accelerator probe: it shows whether a kernel can run under KVM on this host.
//!
//! Some hypervisors offer a KVM without VT-x or AMD-V behind it (module `kvm_pvm`). It makes vCPUs
//! and runs boot sectors, but interprets all kernel code: a million instructions a second, without
//! cmpxchg16b, SSE and x87. Linux ends there in an internal error of KVM, after a minute without a
//! line on its console. The guest uses the same instructions within 0.1 s. `guests/kvm-probe.S`
//! lists its steps.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::blocking_call::run_with_timeout;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::inherit::{inherit, name_in_child};
use crate::sys::parent_death::kill_with_parent;
use crate::sys::pidfd::{Process, wait_readable};

/// The first bytes of the image that replaces the firmware.
const CODE: &[u8] = include_bytes!("../../guests/kvm-probe.bin");
/// QEMU takes only multiples of 64 KiB as firmware.
const IMAGE_SIZE: usize = 64 << 10;
/// A far jump to the code, where the CPU begins.
const RESET_VECTOR: [u8; 5] = [0xea, 0, 0, 0, 0xf0];
/// The exit status by which the guest reports that it passed.
const PASSED: i32 = 171;
/// The guest's steps, by the letters that it writes.
const STEPS: [(u8, &str); 8] = [
    (b'r', "real mode"),
    (b'p', "protected mode"),
    (b'l', "long mode"),
    (b'c', "cmpxchg16b"),
    (b's', "SSE and x87"),
    (b't', "the APIC's timer"),
    (b'i', "the PIT"),
    (b'w', "its loop"),
];

/// CPU time that the guest may use, in seconds. A good KVM needs 0.1 s; one that interprets the
/// guest's loop needs 30 s. A busy host does not lengthen it.
const CPU_LIMIT_SECONDS: u64 = 2;
/// How long QEMU may take; a busy host says nothing about KVM.
const GUEST_TIMEOUT: Duration = Duration::from_secs(20);
/// How long to wait for a killed QEMU. It ends at once unless it hangs in the kernel.
const KILL_TIMEOUT: Duration = Duration::from_secs(2);
/// The most that is read of QEMU's messages, in bytes.
const MAX_OUTPUT: u64 = 64 << 10;

/// Why the guest did not pass.
#[derive(Debug)]
pub(super) struct Failure {
    /// The reason.
    pub error: Error,
    /// Whether the guest ran, so that no other CPU model helps.
    pub has_run: bool,
    /// Whether KVM itself gave up, so that the next run would end the same.
    pub is_certain: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, has_run: false, is_certain: false }
    }
}

/// Runs the guest with `accel` and the CPU model `model`.
///
/// # Errors
/// How far the guest came, and why it ended.
pub(super) fn run(binary: &Path, accel: &str, model: &str) -> Result<(), Failure> {
    let (mut rom, mut letters) = (memory_file("kvm-probe")?, memory_file("kvm-probe-steps")?);
    let mut image = vec![0; IMAGE_SIZE];
    image[..CODE.len()].copy_from_slice(CODE);
    image[IMAGE_SIZE - 16..][..RESET_VECTOR.len()].copy_from_slice(&RESET_VECTOR);
    rom.write_all(&image).map_err(|e| Error::os("write the guest of the KVM probe", e))?;
    let mut child = start(binary, accel, model, &rom, &letters)?;
    let ended = watch(&mut child, Instant::now() + GUEST_TIMEOUT);
    // Fails if QEMU has ended.
    let _ = child.kill();
    let stderr = child.stderr.take().expect("a pipe");
    let waited = run_with_timeout(Instant::now() + KILL_TIMEOUT, move || child.wait());
    let Some(status) = waited.transpose().at("wait for", binary)? else {
        let problem = format!("{} hangs in the kernel with -accel {accel}", binary.display());
        return Err(Error::new(ErrorKind::Host, problem).into());
    };
    let messages = read_bounded(stderr);
    let _ = letters.rewind();
    let passed = read_bounded(letters);
    let end = match ended? {
        End::Exited if status.code() == Some(PASSED) => return Ok(()),
        end => end,
    };
    let step = STEPS.iter().rev().find(|(letter, _)| passed.as_bytes().contains(letter));
    let reached = step.map_or_else(String::new, |(_, name)| format!(" after {name}"));
    let problem = format!(
        "QEMU with -accel {accel} -cpu {model}: the probe's guest ended{reached}: {}",
        end.describe(status, &messages)
    );
    Err(Failure {
        error: Error::new(ErrorKind::Host, problem),
        has_run: step.is_some(),
        is_certain: end == End::Stopped,
    })
}

/// A file in memory.
fn memory_file(name: &str) -> Result<File> {
    let file = memfd_create(name, MemfdFlags::CLOEXEC)
        .map_err(|e| Error::os(format!("create memory file '{name}'"), e))?;
    Ok(file.into())
}

/// Starts QEMU with the guest stopped, and has it continue once the monitor answers: an event
/// before that would not be sent.
fn start(binary: &Path, accel: &str, model: &str, rom: &File, letters: &File) -> Result<Child> {
    let mut command = Command::new(binary);
    // A guest that KVM stopped would stay for ever.
    kill_with_parent(&mut command);
    inherit(&mut command, &[rom, letters]);
    let mut child = command
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S"])
        .args([
            "-machine",
            "q35",
            "-accel",
            accel,
            "-cpu",
            model,
            "-m",
            "2M",
            "-bios",
            &name_in_child(rom),
        ])
        .args(["-debugcon", &format!("file:{}", name_in_child(letters)), "-qmp", "stdio"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"])
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .at("run", binary)?;
    let pid = Pid::from_child(&child);
    let limit = Rlimit { current: Some(CPU_LIMIT_SECONDS), maximum: Some(CPU_LIMIT_SECONDS) };
    // Fails if QEMU has ended; its exit status says more.
    let _ = prlimit(Some(pid), Resource::Cpu, limit);
    let script = b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"cont\"}\n";
    let _ = child.stdin.as_mut().map(|stdin| stdin.write_all(script));
    Ok(child)
}

/// How the guest ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Exited,
    /// QEMU stopped the guest: an internal error of KVM.
    Stopped,
    TimedOut,
}

impl End {
    fn describe(&self, status: ExitStatus, messages: &str) -> String {
        // Earlier messages may be warnings, and KVM prints the CPU's registers after its error.
        let message = messages
            .lines()
            .find(|line| line.contains("KVM internal error"))
            .or_else(|| messages.lines().last())
            .map_or_else(String::new, |line| format!(" ({})", line.trim()));
        match self {
            Self::Exited if status.signal() == Some(Signal::SIGKILL as i32) => {
                format!("it used {CPU_LIMIT_SECONDS} s of CPU time")
            }
            Self::Exited => format!("{status}{message}"),
            Self::Stopped => format!("KVM cannot execute its code{message}"),
            Self::TimedOut => format!("no result in {} s", GUEST_TIMEOUT.as_secs()),
        }
    }
}

/// Reads the monitor until QEMU stops the guest, or until QEMU ends.
fn watch(child: &mut Child, deadline: Instant) -> Result<End> {
    let process = Process::open(child.id() as i32)?;
    let stdout = child.stdout.as_mut().expect("a pipe");
    let (mut output, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let reading = |e| Error::os("read the monitor of the KVM probe", e);
        if !wait_readable(&*stdout, deadline).map_err(reading)? {
            return Ok(End::TimedOut);
        }
        let count = stdout.read(&mut buffer).map_err(reading)?;
        output.extend_from_slice(&buffer[..count]);
        if output.windows(6).any(|bytes| bytes == b"\"STOP\"") {
            return Ok(End::Stopped);
        }
        // QEMU closes its monitor before it ends.
        if count == 0 || output.len() as u64 > MAX_OUTPUT {
            let ended = process.wait_exit(deadline)?;
            return Ok(if ended { End::Exited } else { End::TimedOut });
        }
    }
}

fn read_bounded(from: impl Read) -> String {
    let mut bytes = Vec::new();
    let _ = from.take(MAX_OUTPUT).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}
