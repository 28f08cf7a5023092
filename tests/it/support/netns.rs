//! Network namespaces: hosts of a test's own, which vanish with the last descriptor of them.
//!
//! A namespace belongs to threads, and so does what they open: sockets, taps, `/proc/sys/net`. [`Namespace::run`]
//! gives a closure a thread inside. Wiring is done with `ip`, as an operator would, and so as a witness of its own.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;

use nix::sched::{CloneFlags, setns, unshare};
use serde_json::Value;

/// One network namespace: no link but `lo`, no address, no rule.
pub struct Namespace(OwnedFd);

impl Namespace {
    /// A new one; `None`, with the reason told, where that can not be had.
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

    /// The same one, for another owner.
    pub fn share(&self) -> Self {
        Self(self.0.try_clone().expect("a descriptor"))
    }

    /// Runs `job` on a thread inside. A panic of the job is one of the caller.
    pub fn run<T: Send>(&self, job: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).expect("setns");
            job()
        };
        let result = std::thread::scope(|scope| scope.spawn(inside).join());
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Where others can open it, as long as it lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Runs `ip` with these words inside; its output. Panics if it fails.
    pub fn ip(&self, words: &str) -> String {
        let output =
            self.run(|| Command::new("ip").args(words.split_whitespace()).output().expect("ip"));
        assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// The same as JSON.
    pub fn ip_json(&self, words: &str) -> Value {
        serde_json::from_str(&self.ip(&format!("-details -json {words}"))).expect("JSON")
    }

    /// The link `name` as `ip` shows it, or `None` if there is none.
    pub fn link(&self, name: &str) -> Option<Value> {
        let links = self.ip_json("address show");
        links.as_array().expect("an array").iter().find(|link| link["ifname"] == name).cloned()
    }

    /// Plugs a cable into the link `here` of this one and the link `there` of `other`, both new and up.
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
