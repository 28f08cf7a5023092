//! What on this host is not as the records say, and how it is mended: `bosh-qemu-cpi audit` and `gc`.
//!
//! ```text
//!   objects     records that can not be read, creates and removals cut short, files without a record
//!   attachments who has which disk: calls cut short, records that do not agree
//!   images      images that are not there, files in pools that no record knows of
//!   machines    VMs that are off and should run, VMs without a supervisor
//!   networks    what networks of running VMs lack, bridges that are kept for nobody
//!   gone        all that is left of VMs that are gone: QEMU, taps, rules, claims, uid, control groups, sockets
//!   debris      locks and half-written files that belong to nothing
//! ```
//!
//! Every verb settles what it meets on its own cid, so nothing needs this to be run. It is for the operator who wants
//! to know, and for what nobody will ask about again. The rules:
//!
//! - What a call is working on, and so has a lock on, is no finding.
//! - Only what is certainly ours and certainly of no use is removed. A file that has no record was not left by us (records
//!   are written first and removed last), so somebody has to decide about it who knows more.

mod attachments;
mod debris;
mod gone;
mod images;
mod machines;
mod networks;
mod objects;

use std::time::{Duration, Instant};

use serde::Serialize;

use super::Cpi;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Guard, Rank};

/// How long mending one thing may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What kind of thing it is.
    pub kind: Kind,
    /// The thing: a cid, a path, a name.
    pub what: String,
    /// What is wrong with it.
    pub why: String,
    /// What is done about it.
    pub cure: Cure,
}

/// Kinds of findings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A create or a removal that was cut short.
    Unfinished,
    /// A record that can not be used.
    Corrupt,
    /// Files without a record.
    NoRecord,
    /// A VM that is off and should run.
    Down,
    /// A VM that runs without a supervisor.
    Unsupervised,
    /// A VM that its Director may not know of.
    Untold,
    /// An attach or a detach that was cut short.
    Unsettled,
    /// Something of an object that is gone.
    Orphan,
    /// A network that lacks something its VMs need.
    Network,
    /// An image that is not there.
    NoImage,
}

/// What is done about a finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cure {
    /// `gc` mends it.
    Gc,
    /// It was mended.
    Mended,
    /// It could not be mended, for this reason.
    Failed(String),
    /// Somebody has to decide: this is the next step.
    Operator(String),
}

impl Cpi {
    /// Everything that is not as it should be; mended as it is found if `mend`.
    ///
    /// # Errors
    /// Only if the state directory can not be listed.
    pub fn audit(&self, mend: bool) -> Result<Vec<Finding>> {
        let mut audit = Audit { cpi: self, mend, findings: Vec::new() };
        if !self.store.state_dir().exists() {
            return Ok(audit.findings);
        }
        self.store.own_run_dir()?;
        audit.objects()?;
        audit.attachments()?;
        audit.images()?;
        audit.machines()?;
        audit.networks()?;
        audit.gone_vms()?;
        audit.debris()?;
        Ok(audit.findings)
    }
}

struct Audit<'a> {
    cpi: &'a Cpi,
    mend: bool,
    findings: Vec<Finding>,
}

impl Audit<'_> {
    /// Notes something that `mend` would put right, and has it do so if that is wanted.
    fn found(&mut self, kind: Kind, what: &impl ToString, why: &str, mend: impl FnOnce() -> Result<()>) {
        let cure = match self.mend.then(mend) {
            None => Cure::Gc,
            Some(Ok(())) => Cure::Mended,
            Some(Err(error)) => Cure::Failed(error.report()),
        };
        self.findings.push(Finding { kind, what: what.to_string(), why: why.to_owned(), cure });
    }

    /// Notes something that only a person can put right.
    fn told(&mut self, kind: Kind, what: &impl ToString, why: &str, next_step: &str) {
        let (what, why) = (what.to_string(), why.to_owned());
        self.findings.push(Finding { kind, what, why, cure: Cure::Operator(next_step.to_owned()) });
    }

    /// The lock of something nobody works on; `None` if a call does.
    fn idle(&self, rank: Rank, name: impl std::fmt::Display) -> Result<Option<Guard>> {
        match self.cpi.store.lock(rank, name, Instant::now()) {
            Err(error) if error.kind() == ErrorKind::Timeout => Ok(None),
            lock => lock.map(Some),
        }
    }

    fn deadline() -> Instant {
        Instant::now() + PATIENCE
    }
}

/// What is wrong, without the hint.
fn message(error: &Error) -> String {
    error.to_string()
}
