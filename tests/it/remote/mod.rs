//! Calls from a machine that runs no VMs to a host elsewhere.

mod answers;
mod connections;
mod host_groups;
mod install;
mod ownership;
mod restrictions;
mod stemcell_upload;
mod transport;

use std::fs;
use std::path::Path;
use std::process::Child;

use bosh_qemu_cpi::sys::pidfd::Process;
use serde_json::{Value, json};

use crate::support::answer::Answer;
use crate::support::host::Host;
use crate::support::remote::{Director, Sshd};

/// A host, and a machine that calls it through ssh.
pub struct Pair {
    pub sshd: Sshd,
    pub director: Director,
    pub host: Host,
}

impl Pair {
    pub fn new() -> Option<Self> {
        Self::with(&json!({}), "")
    }

    /// A pair with more configuration of the host's program and of its sshd.
    pub fn with(config: &Value, sshd: &str) -> Option<Self> {
        let (host, director) = (Host::with(config.clone())?, Director::new()?);
        let sshd = Sshd::start(&director, &host, 0, sshd)?;
        director.configure(&json!({"transport": sshd.transport()}));
        Some(Self { sshd, director, host })
    }

    /// The transport with one key changed.
    fn transport_with(&self, key: &str, value: &Value) -> Value {
        let mut transport = self.sshd.transport();
        transport[key] = value.clone();
        transport
    }

    /// The host's processes that answer a caller.
    fn answering(&self) -> Vec<Process> {
        processes(&["host\0serve", &self.host.path("cpi.json").display().to_string()])
    }

    /// The ssh processes of the caller's calls.
    fn calling(&self) -> Vec<Process> {
        let director = self.director.path("").display().to_string();
        processes(&["ssh\0-F\0none\0-T", &director, "\0host\0serve"])
    }
}

/// The processes whose command lines contain all of `words`, without shells.
fn processes(words: &[&str]) -> Vec<Process> {
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let matching = pids.filter(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        words.iter().all(|word| line.contains(word))
            && !line.starts_with("/bin/sh")
            && !line.starts_with("bash")
    });
    matching.filter_map(|pid| Process::open(pid).ok()).collect()
}

/// The answer of a call that was started.
fn answer(call: Child) -> Answer {
    Answer::of(&call.wait_with_output().unwrap())
}

/// Writes a script that stands for the host's program: it greets, reads the request, runs `act` and
/// answers `false`.
fn answering(script: &Path, greeting: &str, act: &str) {
    let answer = r#"{"answer":{"text":"{\"result\":false,\"error\":null,\"log\":\"\"}"}}"#;
    let lines = format!("echo '{greeting}'\nread request\n{act}\ncat <<'E'\n{answer}\nE\n");
    fs::write(script, lines).unwrap();
}
