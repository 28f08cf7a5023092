//! OpenSSH's `ssh`, given everything it may use: the key, the host's key, and no configuration, agent or known hosts of
//! anybody's.
//!
//! Keys are in memory that has no name but `/proc/<our pid>/fd/<n>`, mode 0600 and there for no other user, and goes with
//! this process. What ssh has to say of itself goes to such a file, too; its standard error is the host's.

use std::fs::{File, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::control_path::{self, Shared};
use super::session::{Below, Broken, Connection, Ends};
use crate::config::Transport;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::pidfd::Process;

/// What is called on the host, where no forced command says so.
const REMOTE_COMMAND: [&str; 3] = ["bosh-qemu-cpi", "host", "serve"];

/// What the host's key is filed under: it is the only one, so its name does not matter.
const ALIAS: &str = "host";

/// The most that is kept of what ssh and the host's shell say.
const WORDS: u64 = 4096;

/// How long an ssh that closed its pipes may take to end.
const ENDS: Duration = Duration::from_secs(2);

/// Opens a session on the host.
///
/// # Errors
/// [`ErrorKind::Host`] if ssh can not be started, or not connect.
pub(super) fn open(
    transport: &Transport,
    connection: Connection,
    deadline: Instant,
) -> Result<Ends> {
    let target = Target::new(transport)?;
    let shared = match connection {
        Connection::Shared => control_path::share(&target, deadline)?,
        Connection::Own => None,
    };
    let mut command = target.command()?;
    if let Some(Shared { socket, .. }) = &shared {
        command.arg("-S").arg(socket);
    }
    command.arg("--").arg(&target.host).args(REMOTE_COMMAND);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(not_started)?;
    let ends = (child.stdout.take(), child.stdin.take(), child.stderr.take());
    let (Some(reader), Some(writer), Some(mut complaints)) = ends else {
        unreachable!("all three are piped")
    };
    let (heard, said) = channel();
    std::thread::spawn(move || {
        let mut words = Vec::new();
        // More than that is read, so that nobody waits for room, and forgotten.
        let _ = complaints.by_ref().take(WORDS).read_to_end(&mut words);
        let _ = heard.send(String::from_utf8_lossy(&words).into_owned());
        let _ = io::copy(&mut complaints, &mut io::sink());
    });
    let below =
        Arc::new(Session { child: Mutex::new(child), target, said: Mutex::new(said), shared });
    Ok(Ends { reader: Box::new(reader), writer: Box::new(writer), below })
}

pub(super) fn not_started(error: io::Error) -> Error {
    let failure = Error::new(ErrorKind::Host, "start ssh");
    let missing = error.kind() == io::ErrorKind::NotFound;
    let failure = failure.because(error);
    if missing { failure.hint("install OpenSSH's client: openssh-client") } else { failure }
}

/// A host with what it takes to log in there.
pub(super) struct Target {
    pub host: String,
    port: u64,
    user: String,
    /// Calls that share a connection.
    pub sessions: u64,
    key: Memory,
    known_hosts: Memory,
    /// What ssh says of itself.
    log: Memory,
    /// Tells targets apart without saying what they are.
    pub identity: String,
}

impl Target {
    fn new(transport: &Transport) -> Result<Self> {
        let absent = || Error::new(ErrorKind::Internal, "a transport by ssh was not validated");
        let host = transport.host.as_ref().ok_or_else(absent)?.to_string();
        let mut key = transport.private_key.0.clone().ok_or_else(absent)?;
        if !key.ends_with('\n') {
            key.push('\n');
        }
        let host_key = transport.host_key.as_ref().ok_or_else(absent)?.as_str();
        let user = transport.user.to_string();
        let port = transport.port.get();
        let facts = [host.as_str(), &port.to_string(), &user, host_key, &key].join("\0");
        Ok(Self {
            identity: crate::digest::Digest::of(facts.as_bytes()).to_string()[..16].to_owned(),
            key: Memory::of("key", key.as_bytes())?,
            known_hosts: Memory::of("host-key", format!("{ALIAS} {host_key}\n").as_bytes())?,
            log: Memory::of("log", b"")?,
            host,
            port,
            user,
            sessions: transport.sessions.get(),
        })
    }

    /// `ssh` with all its options, but where to.
    pub fn command(&self) -> Result<Command> {
        let mut command = Command::new("ssh");
        // Its messages are read here, so not in the caller's language.
        command
            .env_clear()
            .env("LC_ALL", "C")
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        command.args(["-F", "none", "-T", "-a", "-x", "-E"]).arg(self.log.path());
        command.args(["-p", &self.port.to_string(), "-l", &self.user]);
        for option in OPTIONS {
            command.args(["-o", option]);
        }
        for (option, value) in
            [("IdentityFile", self.key.path()), ("UserKnownHostsFile", self.known_hosts.path())]
        {
            command.args(["-o", &format!("{option}={}", value.display())]);
        }
        Ok(command)
    }

    /// Why ssh failed with `status`; `said`: by the host.
    pub fn why(&self, status: Option<ExitStatus>, said: &str) -> Option<Broken> {
        explain(status.and_then(|status| status.code()), &self.log.content(), said)
    }
}

/// Nothing is asked of anybody, nothing is forwarded, one key is used and one is accepted. A dead link is noticed in 15 s: when
/// two questions went unanswered and the third is due.
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

/// A file in memory, which `ssh` opens by the descriptor of this process.
struct Memory(File);

impl Memory {
    fn of(name: &str, content: &[u8]) -> Result<Self> {
        let made = || -> io::Result<File> {
            let mut file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC)?);
            // ssh refuses keys that others could read; memory starts with mode 0777.
            file.set_permissions(Permissions::from_mode(0o600))?;
            file.write_all(content)?;
            Ok(file)
        };
        made().map(Self).map_err(|error| Error::os("make a file in memory", error))
    }

    fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }

    fn content(&self) -> String {
        let mut bytes = Vec::new();
        let mut file = &self.0;
        let read = file.rewind().and_then(|()| file.take(WORDS).read_to_end(&mut bytes));
        read.map_or_else(|_| String::new(), |_| String::from_utf8_lossy(&bytes).into_owned())
    }
}

struct Session {
    child: Mutex<Child>,
    target: Target,
    /// What the host has to say beside its answer, once.
    said: Mutex<Receiver<String>>,
    shared: Option<Shared>,
}

impl Session {
    /// How it ended, if it has, or does soon.
    fn status(&self) -> Option<ExitStatus> {
        let process = Process::open(self.child().id().cast_signed()).ok()?;
        // Whoever cuts the way must not have to wait for it.
        let ended = process.wait_exit(Instant::now() + ENDS).ok()?;
        if ended { self.child().try_wait().ok()? } else { None }
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Below for Session {
    fn cut(&self) {
        let mut child = self.child();
        // It may have ended. After SIGKILL it does.
        let _ = child.kill().and_then(|()| child.wait());
    }

    fn why(&self) -> Option<Broken> {
        let status = self.status();
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        // Its end may be read a moment later than that of the process.
        let said = said.recv_timeout(ENDS).unwrap_or_default();
        self.target.why(status, &said)
    }

    /// ssh ends with 255 when it fails itself, or of a signal; with any other status the host has spoken.
    fn is_worn(&self) -> bool {
        self.shared.is_some()
            && self.status().is_none_or(|status| matches!(status.code(), None | Some(255)))
    }
}

/// What ssh said, by what it means. The first that is found counts.
const MEANINGS: [(&str, &str, Option<&str>); 12] = [
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "the host's key is not the one in 'host_key'",
        Some(
            "if the host was installed anew, put its new key there; if not, somebody else answers in its place",
        ),
    ),
    (
        "Host key verification failed",
        "the host's key is not the one in 'host_key'",
        Some(
            "if the host was installed anew, put its new key there; if not, somebody else answers in its place",
        ),
    ),
    ("No ECDSA host key is known", "the host has no key of the kind in 'host_key'", None),
    (
        "Permission denied",
        "the host refuses the key in 'private_key'",
        Some(
            "add its public half to the user's authorized_keys there: bosh-qemu-cpi host authorize prints the line",
        ),
    ),
    (
        "Load key",
        "the key in 'private_key' can not be read",
        Some("it must be a private key without a passphrase"),
    ),
    (
        "Connection refused",
        "connection refused",
        Some("see whether sshd runs there and listens on this port"),
    ),
    ("No route to host", "no route to the host", None),
    ("Network is unreachable", "no route to the host", None),
    (
        "timed out",
        "the host does not answer",
        Some("see whether it is up and this network reaches it"),
    ),
    ("Could not resolve hostname", "the host's name is unknown here", None),
    (
        "reset by peer",
        "the host closed the connection",
        Some("its sshd may have more connections than MaxStartups"),
    ),
    (
        "Connection closed",
        "the host closed the connection",
        Some("its sshd may have more connections than MaxStartups"),
    ),
];

/// What `code`, ssh's own `log` and what the host `said` on standard error come to.
fn explain(code: Option<i32>, log: &str, said: &str) -> Option<Broken> {
    let broken = |cause: String, hint| Some(Broken { cause, hint });
    // Load key is a warning that comes before the refusal it leads to.
    let unreadable = MEANINGS.iter().find(|(word, ..)| *word == "Load key" && log.contains(word));
    let known = unreadable.or_else(|| MEANINGS.iter().find(|(words, ..)| log.contains(words)));
    if let Some((_, cause, hint)) = known {
        return broken((*cause).to_owned(), *hint);
    }
    let shown =
        |line: &str| line.chars().take(200).flat_map(char::escape_debug).collect::<String>();
    let last =
        |text: &str| text.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(shown);
    match (code, last(said), last(log)) {
        (Some(127), said, _) => broken(
            format!(
                "the program is not there{}",
                said.map(|said| format!(": {said}")).unwrap_or_default()
            ),
            Some("install it: bosh-qemu-cpi host install"),
        ),
        (Some(0), ..) | (None, None, None) => None,
        (Some(255), _, Some(log)) => broken(format!("ssh: {log}"), None),
        (Some(255), ..) => broken("the connection broke".to_owned(), None),
        (_, Some(said), _) => broken(format!("the host said: {said}"), None),
        (code, None, _) => code
            .and_then(|code| broken(format!("the host's command ended with status {code}"), None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cause(code: i32, log: &str, said: &str) -> String {
        explain(Some(code), log, said).map(|broken| broken.cause).unwrap_or_default()
    }

    #[test]
    fn what_ssh_says_is_told_in_words_of_this_configuration() {
        let changed = "@@@@\r\n@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\r\nHost key verification failed.\r\n";
        assert_eq!(cause(255, changed, ""), "the host's key is not the one in 'host_key'");
        let refused = "root@h: Permission denied (publickey).\r\n";
        assert_eq!(cause(255, refused, ""), "the host refuses the key in 'private_key'");
        let bad = "Load key \"/proc/1/fd/3\": error in libcrypto\r\nroot@h: Permission denied (publickey).\r\n";
        assert_eq!(cause(255, bad, ""), "the key in 'private_key' can not be read");
        assert_eq!(
            cause(255, "ssh: connect to host h port 22: Connection refused\r\n", ""),
            "connection refused"
        );
        assert_eq!(cause(255, "something new\r\n", ""), "ssh: something new");
    }

    #[test]
    fn what_the_host_says_is_told_and_kept_on_one_line() {
        assert_eq!(
            cause(127, "", "bash: line 1: bosh-qemu-cpi: command not found\n"),
            "the program is not there: bash: line 1: bosh-qemu-cpi: command not found"
        );
        assert_eq!(cause(1, "", "\u{1b}[31mno\n"), "the host said: \\u{1b}[31mno");
        assert_eq!(explain(Some(0), "", ""), None);
    }
}
