//! Calls of a machine on which no VM runs.

mod answers;
mod host_groups;
mod install;
mod ownership;
mod restrictions;
mod stemcell_upload;
mod transport;

use serde_json::{Value, json};

use crate::support::host::Host;
use crate::support::remote::{Office, Sshd};

/// A host, and an office that calls it through ssh.
pub struct Pair {
    pub sshd: Sshd,
    pub office: Office,
    pub host: Host,
}

impl Pair {
    pub fn new() -> Option<Self> {
        Self::with(&json!({}), "")
    }

    /// The same with more configuration of the host's program and of its sshd.
    pub fn with(config: &Value, sshd: &str) -> Option<Self> {
        let (host, office) = (Host::with(config.clone())?, Office::new()?);
        let sshd = Sshd::start(&office, &host, 0, sshd)?;
        office.configure(&json!({"transport": sshd.transport()}));
        Some(Self { sshd, office, host })
    }
}
