//! OpenSSH's `ssh` with explicit options only: the private key, the one accepted host key, and no
//! configuration file, agent or known hosts of the user.
//!
//! Keys are in memory files without a name: ssh opens `/proc/<pid of the call>/fd/<n>`. They have
//! mode 0600, so only this user can open them, and they end with the call. ssh writes its own
//! messages to such a file, too; its standard error carries that of the host's command.

use std::fs::{File, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::channel::{Channel, ChannelFailure, Endpoints};
use super::diagnosis::{self, SSH_FAILED};
use super::shared_connection::{self, SharedConnection};
use crate::config::Transport;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::pidfd::Process;

/// The command on the host. A forced command in `authorized_keys` replaces it.
const REMOTE_COMMAND: [&str; 3] = ["bosh-qemu-cpi", "host", "serve"];

/// The most bytes of ssh's log, and of the standard error of the host's command, that are read.
const MAX_LOG: u64 = 4096;

/// Time an ssh has to exit, and its standard error to end, after its standard output has ended.
const SSH_EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// Whether a session may run on a connection that other calls use, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sharing {
    /// It joins a shared connection, or makes one.
    Allowed,
    /// It has a connection of its own.
    None,
}

/// Starts ssh for one session on the host of `transport`.
///
/// # Errors
/// [`ErrorKind::Host`] if ssh cannot be started. If ssh cannot connect, the session's first read
/// ends, and [`Channel::failure`] says why.
pub(super) fn open(
    transport: &Transport,
    sharing: Sharing,
    deadline: Instant,
) -> Result<Endpoints> {
    let target = Target::new(transport)?;
    let shared = match sharing {
        Sharing::Allowed => shared_connection::choose(&target.digest, target.sessions, deadline)?,
        Sharing::None => None,
    };
    let mut child = target
        .command(shared.as_ref())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(start_error)?;
    let pipes = (child.stdout.take(), child.stdin.take(), child.stderr.take());
    let (Some(reader), Some(writer), Some(stderr)) = pipes else {
        unreachable!("all three are piped")
    };
    let session = SshSession {
        child: Mutex::new(child),
        target,
        stderr: Mutex::new(read_in_background(stderr)),
        joined: shared.as_ref().is_some_and(|shared| shared.exists),
        shared: Mutex::new(shared),
    };
    Ok(Endpoints { reader: Box::new(reader), writer: Box::new(writer), channel: Arc::new(session) })
}

fn start_error(error: io::Error) -> Error {
    let failure = Error::new(ErrorKind::Host, "start ssh");
    let missing = error.kind() == io::ErrorKind::NotFound;
    let failure = failure.because(error);
    if missing {
        failure.hint("install OpenSSH's client: the package openssh-client")
    } else {
        failure
    }
}

/// Reads `stderr` to its end in a thread, so that the host never blocks on a full pipe. Sends its
/// first [`MAX_LOG`] bytes, once.
fn read_in_background(mut stderr: ChildStderr) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // Errors end the text, as the end of the pipe does.
        let _ = stderr.by_ref().take(MAX_LOG).read_to_end(&mut bytes);
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
        let _ = io::copy(&mut stderr, &mut io::sink());
    });
    receiver
}

/// A host with everything that ssh needs to log in there.
struct Target {
    host: String,
    port: u64,
    user: String,
    /// Calls on one connection.
    sessions: u64,
    key: MemoryFile,
    known_hosts: MemoryFile,
    /// ssh's own messages.
    log: MemoryFile,
    /// Identifies the connections to this host without naming it: 16 hex digits.
    digest: String,
}

impl Target {
    fn new(transport: &Transport) -> Result<Self> {
        let invalid = || Error::new(ErrorKind::Internal, "an ssh transport was not validated");
        let host = transport.host.as_ref().ok_or_else(invalid)?.to_string();
        let mut key = transport.private_key.0.clone().ok_or_else(invalid)?;
        if !key.ends_with('\n') {
            key.push('\n');
        }
        let host_key = transport.host_key.as_ref().ok_or_else(invalid)?.as_str();
        let user = transport.user.to_string();
        let port = transport.port.get();
        Ok(Self {
            digest: connection_digest(&host, port, &user, host_key, &key),
            key: MemoryFile::new("key", key.as_bytes())?,
            known_hosts: MemoryFile::new("host-key", known_hosts_line(host_key).as_bytes())?,
            log: MemoryFile::new("log", b"")?,
            host,
            port,
            user,
            sessions: transport.sessions.get(),
        })
    }

    /// Returns the ssh command for one session, on the connection `shared` or on one of its own.
    fn command(&self, shared: Option<&SharedConnection>) -> Command {
        let mut command = Command::new("ssh");
        // `explain` matches English messages. The master of a shared connection keeps its working
        // directory, so that must be one that is never unmounted.
        command
            .env_clear()
            .env("LC_ALL", "C")
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
            .current_dir("/");
        command.args(["-F", "none", "-T", "-a", "-x", "-E"]).arg(self.log.path());
        command.args(["-p", &self.port.to_string(), "-l", &self.user]);
        for option in OPTIONS {
            command.args(["-o", option]);
        }
        for (option, file) in
            [("IdentityFile", &self.key), ("UserKnownHostsFile", &self.known_hosts)]
        {
            command.args(["-o", &format!("{option}={}", file.path().display())]);
        }
        match shared {
            Some(shared) => {
                command.args(SHARING_OPTIONS.iter().flat_map(|option| ["-o", option]));
                command.arg("-S").arg(&shared.control_path);
            }
            None => {
                command.args(["-o", "ControlMaster=no", "-S", "none"]);
            }
        }
        command.arg("--").arg(&self.host).args(REMOTE_COMMAND);
        command
    }
}

/// Returns the line of `known_hosts` that accepts `host_key` alone, for [`HostKeyAlias`](OPTIONS).
fn known_hosts_line(host_key: &str) -> String {
    format!("host {host_key}\n")
}

/// Returns what identifies a shared connection: everything that decides how ssh connects and which
/// keys it accepts. So a call never runs on a connection of another configuration, nor on one of a
/// version of this program with other options. It covers what OpenSSH's `%C` does but the local
/// host's name, and is 24 characters shorter: a control socket's path has at most 107.
fn connection_digest(host: &str, port: u64, user: &str, host_key: &str, key: &str) -> String {
    let port = port.to_string();
    let mut facts = vec![host, &port, user, host_key, key];
    facts.extend(OPTIONS);
    facts.extend(SHARING_OPTIONS);
    Digest::of(facts.join("\0").as_bytes()).to_string()[..16].to_owned()
}

/// No prompts, no forwarding, one identity and one host key. ssh notices a dead connection in 15 s:
/// after two keepalives without an answer, when the third is due.
const OPTIONS: [&str; 22] = [
    "BatchMode=yes",
    "IdentitiesOnly=yes",
    "IdentityAgent=none",
    "PreferredAuthentications=publickey",
    "PasswordAuthentication=no",
    "KbdInteractiveAuthentication=no",
    "StrictHostKeyChecking=yes",
    "GlobalKnownHostsFile=/dev/null",
    "HostKeyAlias=host",
    "CheckHostIP=no",
    "UpdateHostKeys=no",
    "VerifyHostKeyDNS=no",
    "ClearAllForwardings=yes",
    "PermitLocalCommand=no",
    "Tunnel=no",
    "Compression=no",
    "ConnectTimeout=10",
    "ConnectionAttempts=1",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=2",
    "EscapeChar=none",
    "LogLevel=ERROR",
];

/// ssh joins the master behind the control socket, or becomes it. The master stays for ten minutes
/// after its last session: that bridges the pauses between the calls of one deployment, and bounds
/// for how long a key that was removed from `authorized_keys` still opens sessions.
const SHARING_OPTIONS: [&str; 2] = ["ControlMaster=auto", "ControlPersist=600"];

/// A file in memory, which ssh opens through `/proc` by this process's descriptor.
struct MemoryFile(File);

impl MemoryFile {
    fn new(name: &str, content: &[u8]) -> Result<Self> {
        let create = || -> io::Result<File> {
            let mut file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC)?);
            // ssh refuses keys that other users could read; the kernel creates memory files with
            // mode 0777.
            file.set_permissions(Permissions::from_mode(0o600))?;
            file.write_all(content)?;
            Ok(file)
        };
        create().map(Self).map_err(|error| Error::os("create a file in memory", error))
    }

    fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }

    /// Returns its first [`MAX_LOG`] bytes as text; empty if it cannot be read.
    fn content(&self) -> String {
        let mut bytes = Vec::new();
        let mut file = &self.0;
        let read = file.rewind().and_then(|()| file.take(MAX_LOG).read_to_end(&mut bytes));
        read.map_or_else(|_| String::new(), |_| String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// The ssh process of one session.
struct SshSession {
    child: Mutex<Child>,
    target: Target,
    /// Sends the standard error of the host's command, once it has ended.
    stderr: Mutex<Receiver<String>>,
    /// Whether the session joined a connection that earlier calls made.
    joined: bool,
    /// The session's place on a shared connection.
    shared: Mutex<Option<SharedConnection>>,
}

impl SshSession {
    /// Returns ssh's exit status, waiting for at most [`SSH_EXIT_TIMEOUT`]. `None` if ssh still
    /// runs.
    fn status(&self) -> Option<ExitStatus> {
        let process = Process::open(lock(&self.child).id().cast_signed()).ok()?;
        // The wait is without the lock: the watchdog may have to kill ssh meanwhile.
        let exited = process.wait_exit(Instant::now() + SSH_EXIT_TIMEOUT).ok()?;
        if exited { lock(&self.child).try_wait().ok()? } else { None }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Channel for SshSession {
    fn close(&self) {
        let mut child = lock(&self.child);
        // Fails only if ssh has exited already. `wait` returns soon after SIGKILL.
        let _ = child.kill().and_then(|()| child.wait());
    }

    fn established(&self) {
        if let Some(shared) = lock(&self.shared).as_mut() {
            shared.established();
        }
    }

    fn failure(&self) -> Option<ChannelFailure> {
        let status = self.status();
        // Standard error may end a moment later than the process.
        let stderr = lock(&self.stderr).recv_timeout(SSH_EXIT_TIMEOUT).unwrap_or_default();
        let code = status.and_then(|status| status.code());
        diagnosis::explain(code, &self.target.log.content(), &stderr)
    }

    /// ssh exits with 255, or by a signal, when ssh itself fails; every other status is the host's.
    fn has_lost_shared_connection(&self) -> bool {
        let is_ssh_failure = |status: ExitStatus| matches!(status.code(), None | Some(SSH_FAILED));
        self.joined && self.status().is_none_or(is_ssh_failure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_of_a_connection_changes_its_digest() {
        let digest = connection_digest("h", 22, "root", "host key", "key");
        assert_eq!(digest, connection_digest("h", 22, "root", "host key", "key"));
        assert_eq!(digest.len(), 16);
        for other in [
            connection_digest("i", 22, "root", "host key", "key"),
            connection_digest("h", 23, "root", "host key", "key"),
            connection_digest("h", 22, "vcap", "host key", "key"),
            connection_digest("h", 22, "root", "other host key", "key"),
            connection_digest("h", 22, "root", "host key", "other key"),
        ] {
            assert_ne!(digest, other);
        }
    }
}
