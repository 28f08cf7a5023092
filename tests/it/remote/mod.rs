//! Remote hosts: calls of a Director's machine that a host executes.

mod answers;
mod host_groups;
mod install;
mod ownership;
mod restrictions;
mod stemcell_upload;
mod transport;

use serde_json::{Value, json};

use crate::support::host::Host;
use crate::support::remote::{Director, Sshd};

/// A host, and a Director's machine that calls it through ssh.
pub struct Pair {
    pub sshd: Sshd,
    pub director: Director,
    pub host: Host,
}

impl Pair {
    pub fn new() -> Option<Self> {
        Self::with(&json!({}), "")
    }

    /// The same with more configuration of the host and of its sshd.
    pub fn with(config: &Value, sshd: &str) -> Option<Self> {
        let (host, director) = (Host::with(config.clone())?, Director::new()?);
        let sshd = Sshd::start(&director, &host, 0, sshd)?;
        director.configure(&json!({"transport": sshd.transport()}));
        Some(Self { sshd, director, host })
    }
}
