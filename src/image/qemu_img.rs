//! Runs `qemu-img` for what this program does not implement itself: LUKS, preallocation,
//! conversion, checks.
//!
//! Formats are always explicit. Paths are absolute, so that QEMU finds no protocol in them. An
//! object's image is named by a descriptor that `qemu-img` inherits, so that it opens the file that
//! was checked. Output is captured, because standard output belongs to the response. The
//! environment is empty except for `PATH`. `qemu-img` opens every file an image's header names, so
//! callers check the headers of untrusted images first.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::blocking_call::run_with_timeout;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Format, ensure_no_external_files};
use crate::store::beneath::{self, Expected, Found, NewFile};
use crate::store::record::Preallocation;
use crate::sys::inherit::{inherit, name_in_child};
use crate::sys::parent_death::kill_with_parent;
use crate::units::Bytes;

/// Most bytes kept of the program's output.
const OUTPUT_LIMIT: usize = 256 * 1024;
/// Most characters of the program's last line in an error.
const LINE_LIMIT: usize = 500;
/// How long to wait for a killed program. It ends at once unless it hangs in the kernel.
const KILL_TIMEOUT: Duration = Duration::from_secs(2);

/// An image to create.
#[derive(Debug, Clone, Copy)]
pub struct NewImage<'a> {
    /// Its path. The file must not exist; its directory must.
    pub path: &'a Path,
    /// Its format.
    pub format: Format,
    /// Virtual size: the size the guest sees. An encrypted image has a header of 2 MiB in addition.
    pub size: Bytes,
    /// How much of the image is allocated at creation.
    pub preallocation: Preallocation,
    /// The file with the key that encrypts the image.
    pub key: Option<&'a Path>,
}

/// A `qemu-img` program.
#[derive(Debug, Clone)]
pub struct QemuImg {
    program: PathBuf,
}

/// An existing image.
#[derive(Debug, Clone, Copy)]
pub struct ExistingImage<'a> {
    /// Its path.
    pub path: &'a Path,
    /// Its format.
    pub format: Format,
    /// The file with the key that decrypts the image, if it is encrypted.
    pub key: Option<&'a Path>,
}

impl ExistingImage<'_> {
    /// The image as a source, as a `json:` name. It sets no backing file, whatever the header
    /// states.
    fn json(&self, file: &Found) -> String {
        let name = name_in_child(file.handle());
        let mut node =
            json!({"driver": self.format.as_str(), "file": {"driver": "file", "filename": name}});
        match (self.format, self.key) {
            (Format::Raw, None) => {}
            (Format::Raw, Some(_)) => {
                node["driver"] = "luks".into();
                node["key-secret"] = SECRET.into();
            }
            (Format::Qcow2, key) => {
                node["backing"] = Value::Null;
                if key.is_some() {
                    node["encrypt"] = json!({"format": "luks", "key-secret": SECRET});
                }
            }
        }
        format!("json:{node}")
    }

    /// The image as the value of `--target-image-opts`.
    fn options(&self, file: &Found) -> String {
        let driver = match (self.format, self.key) {
            (format, None) => format.as_str().to_owned(),
            (Format::Qcow2, Some(_)) => {
                format!("qcow2,encrypt.format=luks,encrypt.key-secret={SECRET}")
            }
            (Format::Raw, Some(_)) => format!("luks,key-secret={SECRET}"),
        };
        format!("driver={driver},file.driver=file,file.filename={}", name_in_child(file.handle()))
    }
}

/// Result of `qemu-img check`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Check {
    /// Number of corruptions: tables that refer to clusters of other data. The image's data may be
    /// wrong.
    #[serde(default)]
    pub corruptions: u64,
    /// Number of leaked clusters: they waste space, the data is intact.
    #[serde(default)]
    pub leaks: u64,
}

impl QemuImg {
    /// Uses the program at `program`.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into() }
    }

    /// Fills `file`, the empty file of `new`.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] at the deadline, [`ErrorKind::NoDiskSpace`], otherwise
    /// [`ErrorKind::Host`] with the program's last line.
    pub(super) fn create(
        &self,
        new: &NewImage<'_>,
        file: &NewFile,
        deadline: Instant,
    ) -> Result<()> {
        let (driver, encrypt) = match (new.key, new.format) {
            (None, format) => (format.as_str(), None),
            (Some(_), Format::Qcow2) => ("qcow2", Some("encrypt.")),
            (Some(_), Format::Raw) => ("luks", Some("")),
        };
        let mut options = format!("preallocation={}", new.preallocation);
        if driver == "qcow2" && encrypt.is_some() {
            options.push_str(",encrypt.format=luks");
        }
        if let Some(prefix) = encrypt {
            // The key is random, so a slow key derivation would only delay each start of a VM.
            options.push_str(&format!(",{prefix}key-secret={SECRET},{prefix}iter-time=10"));
        }
        let secret = new.key.map(secret);
        let size = new.size.get().to_string();
        let mut args = ["create", "-q"].map(OsStr::new).to_vec();
        if let Some(secret) = &secret {
            args.extend(["--object", secret].map(OsStr::new));
        }
        args.extend(["-f", driver, "-o", &options].map(OsStr::new));
        let name = name_in_child(file.as_file());
        args.extend([&name, &size].map(OsStr::new));
        let done = self.run(&args, &[file.as_file()], None, deadline)?;
        done.naming(file.as_file(), new.path).ensure_success("create", new.path)
    }

    /// Copies a qcow2 image, an open file that has no name, into the raw file `target`, leaving
    /// zeros out. The result is not durable: `qemu-img` does not fsync its target.
    ///
    /// # Errors
    /// Those of [`NewImage::create`]. After an error the target has part of the data.
    pub(super) fn convert_file(
        &self,
        file: File,
        target: &NewFile,
        deadline: Instant,
    ) -> Result<()> {
        let name = name_in_child(target.as_file());
        let args = ["convert", "-f", "qcow2", "-O", "raw", STDIN, &name].map(OsStr::new);
        let done = self.run(&args, &[target.as_file()], Some(file), deadline)?;
        done.naming(target.as_file(), target.path()).ensure_success("convert", target.path())
    }

    /// Copies `source` into `target`, an existing empty image of the same size. The result is not
    /// durable. Other processes may write the source meanwhile: see
    /// [`CopySource`](super::CopySource).
    ///
    /// # Errors
    /// Those of [`NewImage::create`]; [`ErrorKind::Corrupt`] if the source's header names other
    /// files.
    /// A guest may have written that header, and root would read those files.
    pub fn convert_into(
        &self,
        source: &ExistingImage<'_>,
        target: &ExistingImage<'_>,
        deadline: Instant,
    ) -> Result<()> {
        let secret = source.key.or(target.key).map(secret);
        let read = beneath::file(source.path, Expected::Own)?;
        let written = beneath::file(target.path, Expected::Own)?;
        ensure_no_external_files(&read, source.format, false)?;
        let (from, to) = (source.json(&read), target.options(&written));
        // `-p` prints progress to a pipe: if the call was killed, SIGPIPE ends the program at its
        // next print.
        let mut args =
            ["convert", "-p", "-U", "-n", "--target-image-opts"].map(OsStr::new).to_vec();
        if target.key.is_none() {
            args.push(OsStr::new("--target-is-zero"));
        }
        if let Some(secret) = &secret {
            args.extend(["--object", secret].map(OsStr::new));
        }
        args.extend([&from, &to].map(OsStr::new));
        let files = [read.handle(), written.handle()];
        let done = self.run(&args, &files, None, deadline)?;
        let done = done.naming(read.handle(), source.path).naming(written.handle(), target.path);
        done.ensure_success("convert", source.path)
    }

    /// Checks the metadata of the qcow2 image at `path`. Repairs nothing.
    pub fn check(&self, path: &Path, deadline: Instant) -> Result<Check> {
        self.check_from(path, None, deadline)
    }

    /// Like [`Self::check`], for an open file that has no name.
    pub(super) fn check_file(&self, file: File, deadline: Instant) -> Result<Check> {
        self.check_from(Path::new(STDIN), Some(file), deadline)
    }

    fn check_from(&self, path: &Path, stdin: Option<File>, deadline: Instant) -> Result<Check> {
        let args = ["check", "-f", "qcow2", "--output=json"].map(OsStr::new);
        let done = self.run(&[&args[..], &[absolute(path)?]].concat(), &[], stdin, deadline)?;
        // Status 2 means corruptions, 3 means leaks; both print a report to standard output.
        if !matches!(done.status.code(), Some(0 | 2 | 3)) {
            done.ensure_success("check", path)?;
        }
        serde_json::from_slice(&done.stdout).map_err(|error| {
            Error::new(ErrorKind::Host, format!("parse qemu-img's report on '{}'", path.display()))
                .because(error)
        })
    }

    /// Runs the program, which inherits `files`.
    fn run(
        &self,
        args: &[&OsStr],
        files: &[&File],
        stdin: Option<File>,
        deadline: Instant,
    ) -> Result<Finished> {
        let mut command = Command::new(&self.program);
        kill_with_parent(&mut command);
        inherit(&mut command, files);
        let mut child = command
            .args(args)
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
            .stdin(stdin.map_or_else(Stdio::null, Stdio::from))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| {
                Error::io("start", &self.program, error)
                    .hint("install the package 'qemu-utils' or set qemu.img_binary")
            })?;
        let done = wait_with_output(&mut child, deadline);
        if done.is_err() {
            // The program may have just ended. One that hangs in the kernel ends when its storage
            // answers, and is not waited for longer.
            let _ = child.kill();
            run_with_timeout(Instant::now() + KILL_TIMEOUT, move || child.wait());
        }
        done.map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => {
                let message = format!(
                    "'{} {}' was killed at its deadline",
                    self.program.display(),
                    args[0].display()
                );
                let hint = "raise the seconds of the method in 'deadlines', or check whether the \
                            image's filesystem answers";
                Error::new(ErrorKind::Timeout, message).hint(hint)
            }
            _ => Error::io("wait for", &self.program, error),
        })
    }
}

/// Id of the QEMU object that holds the key.
const SECRET: &str = "key";

/// The `secret` object that makes `qemu-img` read the key from the file `key`. JSON, because a path
/// may contain commas.
fn secret(key: &Path) -> String {
    json!({"qom-type": "secret", "id": SECRET, "file": key.to_string_lossy()}).to_string()
}

/// Path under which a child opens its standard input again.
const STDIN: &str = "/proc/self/fd/0";

/// Fails if `path` is relative: QEMU takes a relative name with a colon for a protocol.
fn absolute(path: &Path) -> Result<&OsStr> {
    let refused = || {
        Error::new(ErrorKind::Internal, format!("the path '{}' is not absolute", path.display()))
    };
    if path.is_absolute() { Ok(path.as_os_str()) } else { Err(refused()) }
}

struct Finished {
    status: ExitStatus,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Finished {
    /// Puts `path` where the program printed the name of the inherited `file`.
    fn naming(mut self, file: &File, path: &Path) -> Self {
        let printed = String::from_utf8_lossy(&self.stderr);
        self.stderr = printed.replace(&name_in_child(file), &path.to_string_lossy()).into_bytes();
        self
    }

    fn ensure_success(&self, action: &str, path: &Path) -> Result<()> {
        if self.status.success() {
            return Ok(());
        }
        let stderr = String::from_utf8_lossy(&self.stderr);
        let last_line = stderr
            .lines()
            .rev()
            .find(|line| !line.trim().is_empty())
            .unwrap_or("it printed nothing");
        let last_line: String = last_line.chars().take(LINE_LIMIT).collect();
        let kind = if last_line.contains("No space left") {
            ErrorKind::NoDiskSpace
        } else {
            ErrorKind::Host
        };
        let message = format!(
            "qemu-img {action} of '{}' failed ({}): {last_line}",
            path.display(),
            self.status
        );
        Err(Error::new(kind, message))
    }
}

/// Reads the output of `child` until it ends. Fails with [`io::ErrorKind::TimedOut`] at the
/// deadline.
fn wait_with_output(child: &mut Child, deadline: Instant) -> io::Result<Finished> {
    let mut pipes = [Pipe::new(child.stdout.take()), Pipe::new(child.stderr.take())];
    loop {
        let mut open: Vec<&mut Pipe> =
            pipes.iter_mut().filter(|pipe| pipe.file.is_some()).collect();
        if open.is_empty() {
            break;
        }
        let ready = wait_readable(
            open.iter().filter_map(|pipe| pipe.file.as_ref()).map(File::as_fd),
            deadline,
        )?;
        for (pipe, _) in open.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
            pipe.read()?;
        }
    }
    // Closed pipes do not prove that the process ended.
    let pid = Pid::from_raw(child.id() as i32).ok_or(io::ErrorKind::NotFound)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    wait_readable([pidfd.as_fd()], deadline)?;
    let [stdout, stderr] = pipes.map(|pipe| pipe.captured);
    Ok(Finished { status: child.wait()?, stdout, stderr })
}

/// One output pipe of a child, and the first [`OUTPUT_LIMIT`] bytes from it.
struct Pipe {
    /// `None` after its end.
    file: Option<File>,
    captured: Vec<u8>,
}

impl Pipe {
    fn new(end: Option<impl Into<OwnedFd>>) -> Self {
        Self { file: end.map(|end| File::from(end.into())), captured: Vec::new() }
    }

    fn read(&mut self) -> io::Result<()> {
        let mut buffer = [0; 8192];
        let Some(file) = &mut self.file else { return Ok(()) };
        match file.read(&mut buffer)? {
            0 => self.file = None,
            count => self
                .captured
                .extend_from_slice(&buffer[..count.min(OUTPUT_LIMIT - self.captured.len())]),
        }
        Ok(())
    }
}

/// Waits until one of `fds` is readable or closed. Returns for each whether it is.
fn wait_readable<'a>(
    fds: impl IntoIterator<Item = BorrowedFd<'a>>,
    deadline: Instant,
) -> io::Result<Vec<bool>> {
    let mut polled: Vec<PollFd<'_>> =
        fds.into_iter().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
    loop {
        let left =
            deadline.checked_duration_since(Instant::now()).ok_or(io::ErrorKind::TimedOut)?;
        let timeout = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
        match poll(&mut polled, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(polled.iter().map(|fd| !fd.revents().is_empty()).collect()),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests;
