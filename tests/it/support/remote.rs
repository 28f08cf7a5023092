//! Ways into a host from elsewhere: an sshd of a test's own, or a socket as a socket unit has it. Behind each is `host serve`.

use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::answer::{Answer, run};
use super::host::{Host, eventually, request};
use super::netns::Namespace;
use super::skip;

/// A machine that calls hosts: where a Director's workers are.
pub struct Director {
    namespace: Namespace,
    dir: TempDir,
}

impl Director {
    /// One that reaches nobody yet.
    pub fn new() -> Option<Self> {
        let dir = tempfile::Builder::new().prefix("bqo-").tempdir().unwrap();
        Some(Self { namespace: Namespace::new()?, dir })
    }

    /// Its network.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Something in its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Its configuration.
    pub fn configure(&self, config: &Value) {
        fs::write(self.path("cpi.json"), config.to_string()).unwrap();
    }

    /// The program under its configuration, started as the Director does.
    pub fn cpi(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bosh-qemu-cpi"));
        command.arg("--config").arg(self.path("cpi.json"));
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("TMPDIR", self.dir.path());
        command
    }

    /// What the CPI here answers to a whole request.
    pub fn ask(&self, request: &str) -> Answer {
        Answer::of(&self.namespace.run(|| run(self.cpi(), request.as_bytes())))
    }

    /// What the CPI here answers to `method`.
    pub fn call(&self, method: &str, arguments: &Value) -> Answer {
        self.ask(&request(method, arguments))
    }

    /// The result of a call that must succeed.
    pub fn ok(&self, method: &str, arguments: &Value) -> Value {
        self.call(method, arguments).result().clone()
    }

    /// Starts a call and leaves it running, its request read.
    pub fn start(&self, method: &str, arguments: &Value) -> Child {
        let request = request(method, arguments);
        self.namespace.run(|| {
            let mut command = self.cpi();
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = command.spawn().unwrap();
            child.stdin.take().unwrap().write_all(request.as_bytes()).unwrap();
            child
        })
    }

    /// The control sockets of its ssh connections.
    pub fn connections(&self) -> Vec<PathBuf> {
        let dirs = fs::read_dir(self.dir.path()).unwrap().flatten().map(|entry| entry.path());
        let files =
            dirs.filter(|dir| dir.is_dir()).flat_map(|dir| fs::read_dir(dir).unwrap().flatten());
        files.map(|entry| entry.path()).filter(|path| UnixStream::connect(path).is_ok()).collect()
    }
}

impl Drop for Director {
    fn drop(&mut self) {
        for socket in self.connections() {
            let mut command = Command::new("ssh");
            command.args(["-F", "none", "-O", "exit", "-S"]).arg(socket).arg("nowhere");
            let _ = command.stderr(Stdio::null()).stdout(Stdio::null()).status();
        }
    }
}

/// An sshd in a host's network, with a key that may call the CPI there and nothing else.
pub struct Sshd {
    dir: TempDir,
    daemon: Child,
    address: String,
}

impl Sshd {
    /// Cables `director` to `host`, as the `n`th of its hosts, and starts sshd there; `None`, with the reason told, where there
    /// is none. `more` is configuration of sshd.
    pub fn start(director: &Director, host: &Host, n: u8, more: &str) -> Option<Self> {
        if !Path::new("/usr/sbin/sshd").exists() {
            skip("no /usr/sbin/sshd (package openssh-server)");
            return None;
        }
        let (here, there) = (format!("to{n}"), format!("in{n}"));
        director.namespace().cable(&here, host.namespace(), &there);
        director.namespace().ip(&format!("address add 192.0.2.{}/31 dev {here}", 2 * n));
        let address = format!("192.0.2.{}", 2 * n + 1);
        host.namespace().ip(&format!("address add {address}/31 dev {there}"));
        host.namespace().ip("link set lo up");
        // Where it shuts its unprivileged half in; the package's own unit makes it.
        fs::create_dir_all("/run/sshd").unwrap();
        let dir = tempfile::Builder::new().prefix("bqs-").tempdir().unwrap();
        for key in ["host", "caller"] {
            let mut command = Command::new("ssh-keygen");
            command.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(dir.path().join(key));
            assert!(command.status().unwrap().success());
        }
        let daemon = Self::spawn(dir.path(), host, &address, more);
        let sshd = Self { dir, daemon, address };
        sshd.authorize(&host.serve_command());
        Some(sshd)
    }

    fn spawn(dir: &Path, host: &Host, address: &str, more: &str) -> Child {
        let config = format!(
            "ListenAddress {address}\nHostKey {0}/host\nAuthorizedKeysFile {0}/authorized\nStrictModes no\nUsePAM no\n\
             PidFile none\nSubsystem sftp internal-sftp\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n{more}\n",
            dir.display()
        );
        fs::write(dir.join("sshd_config"), config).unwrap();
        let log = fs::File::create(dir.join("log")).unwrap();
        let mut command = Command::new("/usr/sbin/sshd");
        command
            .args(["-D", "-e", "-f"])
            .arg(dir.join("sshd_config"))
            .stdin(Stdio::null())
            .stderr(log);
        let daemon = host.namespace().run(|| command.spawn().unwrap());
        eventually("sshd listens", || {
            fs::read_to_string(dir.join("log")).unwrap().contains("Server listening").then_some(())
        });
        daemon
    }

    /// Has the key start `command` and nothing else.
    pub fn authorize(&self, command: &str) {
        let line = format!("restrict,command=\"{command}\" {}", self.read("caller.pub"));
        fs::write(self.dir.path().join("authorized"), line).unwrap();
    }

    /// Lets the key do anything.
    pub fn trust(&self) {
        fs::write(self.dir.path().join("authorized"), self.read("caller.pub")).unwrap();
    }

    /// A file of its directory: keys and their halves.
    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.dir.path().join(name)).unwrap()
    }

    /// Where the caller's private key is.
    pub fn key(&self) -> PathBuf {
        self.dir.path().join("caller")
    }

    /// Its address.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The process that listens.
    pub fn pid(&self) -> i32 {
        self.daemon.id().cast_signed()
    }

    /// The transport through it.
    pub fn transport(&self) -> Value {
        json!({
            "kind": "ssh", "host": self.address, "private_key": self.read("caller"), "host_key": self.read("host.pub"),
        })
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// A socket in front of a host, as a socket unit with `Accept=yes` has it.
pub struct SocketUnit {
    path: PathBuf,
    closing: Arc<AtomicBool>,
    listener: Option<JoinHandle<()>>,
}

impl SocketUnit {
    /// Listens in the directory of `director`.
    pub fn start(director: &Director, host: &Host) -> Self {
        let path = director.path("cpi.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let closing = Arc::new(AtomicBool::new(false));
        let closes = Arc::clone(&closing);
        let (door, network) = (host.serve_command(), host.namespace().share());
        let accept = move || {
            for stream in listener.incoming() {
                if closes.load(Ordering::SeqCst) {
                    return;
                }
                let stream = OwnedFd::from(stream.unwrap());
                let mut command = Command::new("/bin/sh");
                command.args(["-c", &format!("exec {door}")]).stderr(Stdio::null());
                command.stdin(stream.try_clone().unwrap()).stdout(stream);
                let mut child = network.run(|| command.spawn().unwrap());
                std::thread::spawn(move || child.wait());
            }
        };
        Self { path, closing, listener: Some(std::thread::spawn(accept)) }
    }

    /// The transport through it.
    pub fn transport(&self) -> Value {
        json!({"kind": "unix", "socket": self.path})
    }
}

impl Drop for SocketUnit {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::SeqCst);
        let _ = UnixStream::connect(&self.path);
        let _ = self.listener.take().map(JoinHandle::join);
    }
}
