//! Transports into a host: an sshd of the test, or a socket as systemd's socket unit has it. Each
//! starts `host serve`.

use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use bosh_qemu_cpi::sys::pidfd::Process;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::answer::{Answer, run, spawn};
use super::host::{Host, eventually, request};
use super::netns::Namespace;
use super::skip;

/// A machine that calls hosts, as a Director's workers do.
pub struct Director {
    namespace: Namespace,
    dir: TempDir,
}

impl Director {
    /// A machine without a network to any host.
    pub fn new() -> Option<Self> {
        let dir = tempfile::Builder::new().prefix("bqo-").tempdir().unwrap();
        Some(Self { namespace: Namespace::new()?, dir })
    }

    /// Its network namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// A path in its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes its configuration.
    pub fn configure(&self, config: &Value) {
        fs::write(self.path("cpi.json"), config.to_string()).unwrap();
    }

    /// The command that runs the program with its configuration, as the Director does.
    pub fn cpi(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bosh-qemu-cpi"));
        command.arg("--config").arg(self.path("cpi.json"));
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("TMPDIR", self.dir.path());
        command
    }

    /// The answer of the CPI here to a whole request.
    pub fn ask(&self, request: &str) -> Answer {
        Answer::of(&self.namespace.run(|| run(self.cpi(), request.as_bytes())))
    }

    /// The answer of the CPI here to a call of `method`.
    pub fn call(&self, method: &str, arguments: &Value) -> Answer {
        self.ask(&request(method, arguments))
    }

    /// The result of a call that must succeed.
    pub fn ok(&self, method: &str, arguments: &Value) -> Value {
        self.call(method, arguments).result().clone()
    }

    /// Starts a call, writes its request and leaves it running.
    pub fn start(&self, method: &str, arguments: &Value) -> Child {
        let request = request(method, arguments);
        self.namespace.run(|| {
            let mut child = spawn(self.cpi());
            child.stdin.take().unwrap().write_all(request.as_bytes()).unwrap();
            child
        })
    }

    /// The control sockets of its ssh connections that have a process.
    pub fn connections(&self) -> Vec<PathBuf> {
        let dirs = fs::read_dir(self.dir.path()).unwrap().flatten().map(|entry| entry.path());
        let files =
            dirs.filter(|dir| dir.is_dir()).flat_map(|dir| fs::read_dir(dir).unwrap().flatten());
        files.map(|entry| entry.path()).filter(|path| UnixStream::connect(path).is_ok()).collect()
    }

    /// Ends the ssh connections. A connection keeps the forced command that the key had at login.
    pub fn close_connections(&self) {
        for socket in self.connections() {
            assert!(exit_command(&socket).output().unwrap().status.success());
        }
    }
}

impl Drop for Director {
    fn drop(&mut self) {
        for socket in self.connections() {
            let _ = exit_command(&socket).output();
        }
    }
}

/// The command that ends the connection behind a control socket. ssh ignores the host's name.
fn exit_command(socket: &Path) -> Command {
    let mut command = Command::new("ssh");
    command.args(["-F", "none", "-O", "exit", "-S"]).arg(socket).arg("nowhere");
    command
}

/// An sshd in a host's network, with a key that may call the CPI there and nothing else.
pub struct Sshd {
    dir: TempDir,
    daemon: Child,
    address: String,
}

impl Sshd {
    /// Connects `director` to `host`, as its host number `n`, and starts sshd there with `more`
    /// configuration. Returns `None`, after printing the reason, where no sshd is installed.
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
        // sshd confines its unprivileged process there. The package's own unit creates the
        // directory.
        fs::create_dir_all("/run/sshd").unwrap();
        let dir = tempfile::Builder::new().prefix("bqs-").tempdir().unwrap();
        for key in ["host", "caller"] {
            generate_key(&dir.path().join(key));
        }
        let daemon = Self::spawn(dir.path(), host, &address, more);
        let sshd = Self { dir, daemon, address };
        sshd.authorize(&host.serve_command());
        Some(sshd)
    }

    fn spawn(dir: &Path, host: &Host, address: &str, more: &str) -> Child {
        let config = format!(
            "ListenAddress {address}\nHostKey {0}/host\nAuthorizedKeysFile {0}/authorized\n\
             StrictModes no\nUsePAM no\nPidFile none\nSubsystem sftp internal-sftp\n\
             PermitRootLogin prohibit-password\nPasswordAuthentication no\n{more}\n",
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

    /// Makes `command` the forced command of the caller's key.
    pub fn authorize(&self, command: &str) {
        let line = format!("restrict,command=\"{command}\" {}", self.read("caller.pub"));
        fs::write(self.dir.path().join("authorized"), line).unwrap();
    }

    /// Removes the forced command of the caller's key.
    pub fn trust(&self) {
        fs::write(self.dir.path().join("authorized"), self.read("caller.pub")).unwrap();
    }

    /// Gives sshd another host key. Connections that are logged in stay.
    pub fn change_host_key(&self) {
        let key = self.dir.path().join("host");
        fs::remove_file(&key).unwrap();
        generate_key(&key);
        let listening = |log: &str| log.matches("Server listening").count();
        let log = || fs::read_to_string(self.dir.path().join("log")).unwrap();
        let before = listening(&log());
        Process::open(self.pid()).unwrap().signal(Signal::SIGHUP).unwrap();
        eventually("sshd listens again", || (listening(&log()) > before).then_some(()));
    }

    /// The text of a file in its directory: keys and their public halves.
    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.dir.path().join(name)).unwrap()
    }

    /// The file with the caller's private key.
    pub fn key(&self) -> PathBuf {
        self.dir.path().join("caller")
    }

    /// The address it listens on.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The pid of the process that listens.
    pub fn pid(&self) -> i32 {
        self.daemon.id().cast_signed()
    }

    /// The `transport` of the configuration that leads through it.
    pub fn transport(&self) -> Value {
        json!({
            "kind": "ssh", "host": self.address, "private_key": self.read("caller"),
            "host_key": self.read("host.pub"),
        })
    }
}

fn generate_key(path: &Path) {
    let mut command = Command::new("ssh-keygen");
    command.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path);
    assert!(command.status().unwrap().success());
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

    /// The `transport` of the configuration that leads through it.
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
