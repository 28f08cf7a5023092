//! Network namespaces that stand for hosts. The kernel removes one with its last descriptor.
//!
//! A namespace applies to a thread and to what the thread opens: sockets, taps, `/proc/sys/net`.
//! [`Namespace::run`] runs a closure on a thread inside. Links are made with `ip`, which checks the
//! netlink code of the CPI independently.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;

use nix::sched::{CloneFlags, setns, unshare};
use serde_json::Value;

/// A network namespace. At first it has the link `lo` and no address and no rule.
pub struct Namespace(OwnedFd);

impl Namespace {
    /// Makes a namespace. Prints why and returns `None` if this machine cannot.
    pub fn new() -> Option<Self> {
        let entered = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(Self(File::open("/proc/thread-self/ns/net").expect("own namespace").into()))
        });
        let made: nix::Result<Self> = entered.join().expect("no panic");
        match (made, Command::new("ip").arg("-V").output()) {
            (Ok(namespace), Ok(_)) => Some(namespace),
            (Err(errno), _) => skip(&format!("no network namespace of its own: {errno}")),
            (_, Err(error)) => skip(&format!("no 'ip' (package iproute2): {error}")),
        }
    }

    /// Another handle of the same namespace.
    pub fn share(&self) -> Self {
        Self(self.0.try_clone().expect("a descriptor"))
    }

    /// Runs `job` on a thread inside and passes its panic on.
    pub fn run<T: Send>(&self, job: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).expect("setns");
            job()
        };
        let result = std::thread::scope(|scope| scope.spawn(inside).join());
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// A path by which other processes can open the namespace while this handle exists.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Runs `ip` inside and returns its output. Panics if it fails.
    pub fn ip(&self, words: &str) -> String {
        let output =
            self.run(|| Command::new("ip").args(words.split_whitespace()).output().expect("ip"));
        assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// Runs `ip -details -json` inside and returns the parsed output.
    pub fn ip_json(&self, words: &str) -> Value {
        serde_json::from_str(&self.ip(&format!("-details -json {words}"))).expect("JSON")
    }

    /// The link `name` as `ip` shows it; `None` if there is none.
    pub fn link(&self, name: &str) -> Option<Value> {
        let links = self.ip_json("address show");
        links.as_array().expect("an array").iter().find(|link| link["ifname"] == name).cloned()
    }

    /// Makes a veth pair, up on both sides: `here` in this namespace and `there` in `other`.
    pub fn cable(&self, here: &str, other: &Namespace, there: &str) {
        self.ip(&format!("link add {here} type veth peer name {there} netns {}", other.path()));
        self.ip(&format!("link set {here} up"));
        other.ip(&format!("link set {there} up"));
    }
}

fn skip(reason: &str) -> Option<Namespace> {
    super::skip(reason);
    None
}
