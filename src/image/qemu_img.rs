//! The few `qemu-img` calls that remain: what would be folly to do ourselves.
//!
//! Formats are always explicit, paths absolute (so that QEMU sees no protocol in them), output captured: standard
//! output belongs to the response. The environment is empty but for `PATH`. Whoever calls has looked at the headers
//! of images it does not trust: `qemu-img` opens every file they name.

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

use crate::error::{Error, ErrorKind, Result};
use crate::image::{Format, NewImage, refuse_other_files};
use crate::sys::parent_death::kill_with_parent;
use crate::timeout::run_with_timeout;
use crate::units::Bytes;

/// The most that is kept of what the program says.
const OUTPUT_LIMIT: usize = 256 * 1024;
/// The most characters of its last line that an error repeats.
const LINE_LIMIT: usize = 500;
/// A program that was killed is gone at once, unless the kernel is stuck on its behalf.
const DYING: Duration = Duration::from_secs(2);

/// A `qemu-img` program.
#[derive(Debug, Clone)]
pub struct QemuImg {
    program: PathBuf,
}

/// What is to be copied where.
#[derive(Debug, Clone, Copy)]
pub struct Convert<'a> {
    /// The image to read, with all it is based on.
    pub source: &'a Path,
    /// Its format.
    pub source_format: Format,
    /// The image to write; what is there is replaced, in the same file.
    pub target: &'a Path,
    /// Its format.
    pub target_format: Format,
}

/// An image that is there.
#[derive(Debug, Clone, Copy)]
pub struct Existing<'a> {
    /// Where.
    pub path: &'a Path,
    /// Its format.
    pub format: Format,
    /// The file with the key that opens it, if it is encrypted.
    pub key: Option<&'a Path>,
}

impl Existing<'_> {
    /// As a source. JSON can say that there is no backing file, whatever the header says.
    fn json(&self) -> Result<String> {
        let path = absolute(self.path)?.to_string_lossy();
        let mut node =
            json!({"driver": self.format.as_str(), "file": {"driver": "file", "filename": path}});
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
        Ok(format!("json:{node}"))
    }

    /// What `--target-image-opts` takes.
    fn options(&self) -> Result<String> {
        let driver = match (self.format, self.key) {
            (format, None) => format.as_str().to_owned(),
            (Format::Qcow2, Some(_)) => {
                format!("qcow2,encrypt.format=luks,encrypt.key-secret={SECRET}")
            }
            (Format::Raw, Some(_)) => format!("luks,key-secret={SECRET}"),
        };
        // A comma would end the value.
        let path = absolute(self.path)?.to_string_lossy().replace(',', ",,");
        Ok(format!("driver={driver},file.driver=file,file.filename={path}"))
    }
}

/// What `qemu-img check` found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Check {
    /// Data may be wrong: tables that name what is not theirs.
    #[serde(default)]
    pub corruptions: u64,
    /// Space is wasted, data is sound.
    #[serde(default)]
    pub leaks: u64,
}

impl QemuImg {
    /// The program at `program`.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into() }
    }

    /// Makes `new`, replacing what is there in the same file.
    ///
    /// # Errors
    /// As [`Self::convert`].
    pub fn create(&self, new: &NewImage<'_>, deadline: Instant) -> Result<()> {
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
            // A key is random: a slow derivation would add nothing but time to each start of a VM.
            options.push_str(&format!(",{prefix}key-secret={SECRET},{prefix}iter-time=10"));
        }
        let secret = new.key.map(secret);
        let size = new.size.get().to_string();
        let mut args = ["create", "-q"].map(OsStr::new).to_vec();
        if let Some(secret) = &secret {
            args.extend(["--object", secret].map(OsStr::new));
        }
        args.extend(["-f", driver, "-o", &options].map(OsStr::new));
        args.extend([absolute(new.path)?, OsStr::new(&size)]);
        self.run(&args, None, deadline)?.expect_success("create", new.path)
    }

    /// Copies one image, leaving zeros out. Durable is nothing of it: `qemu-img` does not fsync its target.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] at the deadline, [`ErrorKind::NoDiskSpace`], [`ErrorKind::Host`] otherwise, with the
    /// program's last words. The target is then half written.
    pub fn convert(&self, convert: &Convert<'_>, deadline: Instant) -> Result<()> {
        self.convert_from(convert, None, deadline)
    }

    /// The same from an open file without a name.
    pub(super) fn convert_file(
        &self,
        file: File,
        convert: &Convert<'_>,
        deadline: Instant,
    ) -> Result<()> {
        self.convert_from(convert, Some(file), deadline)
    }

    /// Copies `source` into `target`, an empty image of the same size that is there. Durable is nothing of it. Nobody is kept
    /// from opening the source meanwhile: see [`Source`](super::Source).
    ///
    /// # Errors
    /// As [`Self::convert`]; [`ErrorKind::Corrupt`] if the source's header, which a guest may have written, names other
    /// files: root would read them.
    pub fn fill(
        &self,
        source: &Existing<'_>,
        target: &Existing<'_>,
        deadline: Instant,
    ) -> Result<()> {
        let secret = source.key.or(target.key).map(secret);
        refuse_other_files(source.path, source.format, false)?;
        let (from, to) = (source.json()?, target.options()?);
        // The progress nobody reads ends a program whose caller was killed, at its next step (SIGPIPE).
        let mut args =
            ["convert", "-p", "-U", "-n", "--target-image-opts"].map(OsStr::new).to_vec();
        if target.key.is_none() {
            args.push(OsStr::new("--target-is-zero"));
        }
        if let Some(secret) = &secret {
            args.extend(["--object", secret].map(OsStr::new));
        }
        args.extend([&from, &to].map(OsStr::new));
        self.run(&args, None, deadline)?.expect_success("convert", source.path)
    }

    fn convert_from(
        &self,
        convert: &Convert<'_>,
        stdin: Option<File>,
        deadline: Instant,
    ) -> Result<()> {
        let (from, to) = (convert.source_format.as_str(), convert.target_format.as_str());
        let args = ["convert", "-f", from, "-O", to].map(OsStr::new);
        let args = [&args[..], &[absolute(convert.source)?, absolute(convert.target)?]].concat();
        self.run(&args, stdin, deadline)?.expect_success("convert", convert.source)
    }

    /// Checks the metadata of the qcow2 image at `path`, repairing nothing.
    pub fn check(&self, path: &Path, deadline: Instant) -> Result<Check> {
        self.check_from(path, None, deadline)
    }

    /// The same for an open file without a name.
    pub(super) fn check_file(&self, file: File, deadline: Instant) -> Result<Check> {
        self.check_from(Path::new(STDIN), Some(file), deadline)
    }

    fn check_from(&self, path: &Path, stdin: Option<File>, deadline: Instant) -> Result<Check> {
        let args = ["check", "-f", "qcow2", "--output=json"].map(OsStr::new);
        let done = self.run(&[&args[..], &[absolute(path)?]].concat(), stdin, deadline)?;
        // 2: corruptions found, 3: leaks found; both with a report on standard output.
        if !matches!(done.status.code(), Some(0 | 2 | 3)) {
            done.expect_success("check", path)?;
        }
        serde_json::from_slice(&done.stdout).map_err(|error| {
            Error::new(ErrorKind::Host, format!("read what qemu-img says of '{}'", path.display()))
                .because(error)
        })
    }

    /// Makes the image at `path`, which nobody has open, larger.
    pub fn resize(
        &self,
        path: &Path,
        format: Format,
        size: Bytes,
        deadline: Instant,
    ) -> Result<()> {
        let size = size.get().to_string();
        let args = ["resize", "-f", format.as_str()].map(OsStr::new);
        let args = [&args[..], &[absolute(path)?, OsStr::new(&size)]].concat();
        self.run(&args, None, deadline)?.expect_success("resize", path)
    }

    fn run(&self, args: &[&OsStr], stdin: Option<File>, deadline: Instant) -> Result<Done> {
        let mut command = Command::new(&self.program);
        kill_with_parent(&mut command);
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
        let done = supervise(&mut child, deadline);
        if done.is_err() {
            // It may have just ended. One that hangs in the kernel ends when its storage answers, and is not waited for.
            let _ = child.kill();
            run_with_timeout(Instant::now() + DYING, move || child.wait());
        }
        done.map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => {
                let message = format!("'{} {}' was killed at its deadline", self.program.display(), args[0].display());
                let hint = "give the method more seconds in 'deadlines', or see whether the image's filesystem answers";
                Error::new(ErrorKind::Timeout, message).hint(hint)
            }
            _ => Error::io("wait for", &self.program, error),
        })
    }
}

/// Name of the object that holds a key.
const SECRET: &str = "key";

/// The object that has `qemu-img` read the key in the file `key` by itself. JSON: a path may have commas in it.
fn secret(key: &Path) -> String {
    json!({"qom-type": "secret", "id": SECRET, "file": key.to_string_lossy()}).to_string()
}

/// The name by which a child can open its standard input again.
pub(super) const STDIN: &str = "/proc/self/fd/0";

/// A relative name with a colon in it would be a protocol to QEMU.
fn absolute(path: &Path) -> Result<&OsStr> {
    let refused = || {
        Error::new(ErrorKind::Internal, format!("the path '{}' is not absolute", path.display()))
    };
    if path.is_absolute() { Ok(path.as_os_str()) } else { Err(refused()) }
}

struct Done {
    status: ExitStatus,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Done {
    fn expect_success(&self, action: &str, path: &Path) -> Result<()> {
        if self.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&self.stderr);
        let last =
            said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
        let last: String = last.chars().take(LINE_LIMIT).collect();
        let kind =
            if last.contains("No space left") { ErrorKind::NoDiskSpace } else { ErrorKind::Host };
        let message =
            format!("qemu-img {action} of '{}' failed ({}): {last}", path.display(), self.status);
        Err(Error::new(kind, message))
    }
}

/// Reads what `child` says until it ends. [`io::ErrorKind::TimedOut`] at the deadline.
fn supervise(child: &mut Child, deadline: Instant) -> io::Result<Done> {
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
    // The pipes are closed, so it is ending; but a process may close them and stay.
    let pid = Pid::from_raw(child.id() as i32).ok_or(io::ErrorKind::NotFound)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    wait_readable([pidfd.as_fd()], deadline)?;
    let [stdout, stderr] = pipes.map(|pipe| pipe.said);
    Ok(Done { status: child.wait()?, stdout, stderr })
}

/// One end of a child's output, and its first [`OUTPUT_LIMIT`] bytes.
struct Pipe {
    /// `None` once it has ended.
    file: Option<File>,
    said: Vec<u8>,
}

impl Pipe {
    fn new(end: Option<impl Into<OwnedFd>>) -> Self {
        Self { file: end.map(|end| File::from(end.into())), said: Vec::new() }
    }

    fn read(&mut self) -> io::Result<()> {
        let mut buffer = [0; 8192];
        let Some(file) = &mut self.file else { return Ok(()) };
        match file.read(&mut buffer)? {
            0 => self.file = None,
            count => {
                self.said.extend_from_slice(&buffer[..count.min(OUTPUT_LIMIT - self.said.len())])
            }
        }
        Ok(())
    }
}

/// Waits until one of `fds` is readable or closed and says which are.
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
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::image::{qcow2, raw, testing};

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    /// A program that is not `qemu-img`. Another process writes it: a thread that forks while we have it open for
    /// writing would make it busy (ETXTBSY).
    fn script(dir: &Path, text: &str) -> QemuImg {
        let (draft, path) = (dir.join("draft"), dir.join("script"));
        std::fs::write(&draft, format!("#!/bin/sh\n{text}\n")).unwrap();
        testing::run("install", ["-m700".into(), draft.into(), path.clone().into()]);
        QemuImg::new(path)
    }

    #[test]
    fn convert_check_and_resize_with_the_real_program() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("a:b.raw"), dir.path().join("b.qcow2"));
        raw::create(&source, Bytes(1 << 20)).unwrap().sync().unwrap();
        let img = QemuImg::new("qemu-img");
        let convert = Convert {
            source: &source,
            source_format: Format::Raw,
            target: &target,
            target_format: Format::Qcow2,
        };
        img.convert(&convert, soon()).unwrap();
        img.resize(&target, Format::Qcow2, Bytes(2 << 20), soon()).unwrap();
        assert_eq!(qcow2::Header::read(&target).unwrap().virtual_size, Bytes(2 << 20));
        assert_eq!(img.check(&target, soon()).unwrap(), Check { corruptions: 0, leaks: 0 });
        // The L2 table of the first cluster is said to lie where the header is.
        let file = File::options().write(true).open(&target).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[0; 8], 0x20000).unwrap();
        assert!(img.check(&target, soon()).unwrap().corruptions > 0);
    }

    #[test]
    fn a_failure_says_the_last_line_and_the_environment_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let img = script(dir.path(), "echo first >&2; echo \"$1 HOME=$HOME last\" >&2; exit 1");
        let failed = img.resize(&path, Format::Raw, Bytes(512), soon()).unwrap_err();
        assert!(
            failed.report().ends_with("(exit status: 1): resize HOME= last"),
            "{}",
            failed.report()
        );
        assert_eq!(failed.kind(), ErrorKind::Host);
        let full =
            script(dir.path(), "echo 'qemu-img: error: No space left on device' >&2; exit 1");
        assert_eq!(
            full.resize(&path, Format::Raw, Bytes(512), soon()).unwrap_err().kind(),
            ErrorKind::NoDiskSpace
        );
        let absent = QemuImg::new("/nonexistent/qemu-img").check(&path, soon()).unwrap_err();
        assert!(absent.report().contains("Hint: install"), "{}", absent.report());
    }

    #[test]
    fn the_deadline_kills_what_hangs_whether_it_talks_or_not() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["exec sleep 1000", "exec sleep 1000 >&- 2>&-", "while :; do echo y; done"] {
            let img = script(dir.path(), text);
            let started = Instant::now();
            let killed =
                img.check(&dir.path().join("x"), started + Duration::from_millis(100)).unwrap_err();
            assert_eq!(killed.kind(), ErrorKind::Timeout, "{}", killed.report());
            assert!(started.elapsed() < Duration::from_secs(30));
        }
    }

    #[test]
    fn endless_output_is_read_but_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let img = script(dir.path(), "head -c 10000000 /dev/zero | tr '\\0' x >&2; exit 1");
        let failed =
            img.resize(&dir.path().join("x"), Format::Raw, Bytes(512), soon()).unwrap_err();
        assert!(failed.report().len() < 2000, "{} bytes", failed.report().len());
    }
}
