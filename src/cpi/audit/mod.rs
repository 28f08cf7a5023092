//! What on this host is not as the records say, and how it is mended: `bosh-qemu-cpi audit` and `gc`.
//!
//! ```text
//!   objects     records that can not be read, creates and removals cut short, files without a record
//!   attachments who has which disk: calls cut short, records that do not agree
//!   images      images that are not there, files in pools that no record knows of, the key of encrypted disks
//!   machines    VMs that are off and should run, VMs without a supervisor
//!   names       uids, addresses and ports that records give to VMs, and no link keeps for them
//!   networks    what networks of running VMs lack, pins that can not be read, bridges that are kept for nobody
//!   gone        all that is left of VMs that are gone: QEMU, taps, rules, claims, uid, control groups, sockets
//!   debris      locks and half-written files that belong to nothing
//! ```
//!
//! Every verb settles what it meets on its own cid, so nothing needs this to be run. It is for the operator who wants
//! to know, and for what nobody will ask about again. The rules:
//!
//! - What a call is working on, and so has a lock on, is no finding.
//! - Looking needs no write (`hold`). What can not be looked at is a finding, and the rest is looked at.
//! - Only what is certainly ours and certainly of no use is removed. A file that has no record was not left by us (records
//!   are written first and removed last), so somebody has to decide about it who knows more.

mod attachments;
mod debris;
mod gone;
mod hold;
mod images;
mod machines;
mod names;
mod networks;
mod objects;

use std::time::{Duration, Instant};

use serde::Serialize;

use super::Cpi;
use crate::error::{Error, Result};

/// How long mending one thing may take.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK_AGAIN: &str = "put that right, and look again";

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
    /// A record, or another file of ours, that can not be used.
    Corrupt,
    /// Something that can not be looked at.
    Unknown,
    /// Files without a record.
    NoRecord,
    /// A VM that is off and should run.
    Down,
    /// A VM that runs without a supervisor.
    Unsupervised,
    /// Something that its Director may not know of.
    Untold,
    /// An attach or a detach that was cut short.
    Unsettled,
    /// Something that is a VM's own, and that nothing keeps others from.
    Unclaimed,
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
    /// Everything that is not as it should be. Changes nothing, and needs nothing but to read.
    pub fn audit(&self) -> Vec<Finding> {
        let mut audit = Audit { cpi: self, mend: false, findings: Vec::new() };
        match self.store.is_initialized() {
            Ok(_) if self.store.state_dir().exists() => audit.everything(),
            Ok(_) => {}
            // Whatever else is there may mean anything.
            Err(error) => audit.unusable(&self.store.schema_file().display(), &error),
        }
        audit.findings
    }

    /// The same, put right as it is found.
    ///
    /// # Errors
    /// As [`Store::prepare`](crate::store::Store::prepare), and if nothing can be written.
    pub fn gc(&self) -> Result<Vec<Finding>> {
        let mut audit = Audit { cpi: self, mend: true, findings: Vec::new() };
        self.store.ensure_mounted()?;
        if self.store.state_dir().exists() {
            self.store.prepare()?;
            self.store.ensure_writable()?;
            audit.everything();
        }
        Ok(audit.findings)
    }
}

/// A part of the audit.
type Part = fn(&mut Audit<'_>) -> Result<()>;

/// All of them, and which ask the run directory what runs.
const PARTS: [(&str, bool, Part); 8] = [
    ("objects", false, |audit| audit.objects()),
    ("attachments", false, |audit| audit.attachments()),
    ("images", false, |audit| audit.images()),
    ("machines", true, |audit| audit.machines()),
    ("names", false, |audit| audit.names()),
    ("networks", true, |audit| audit.networks()),
    ("what is left of VMs", true, |audit| audit.gone_vms()),
    ("debris", false, |audit| audit.debris()),
];

struct Audit<'a> {
    cpi: &'a Cpi,
    mend: bool,
    findings: Vec<Finding>,
}

impl Audit<'_> {
    fn everything(&mut self) {
        let ours = self.cpi.store.ensure_run_dir_matches();
        if let Err(error) = &ours {
            self.unusable(&"run_dir", error);
        }
        for (what, asks_run_dir, part) in PARTS {
            if asks_run_dir && ours.is_err() {
                continue;
            }
            if let Err(error) = part(self) {
                self.unknown(&what, &error);
            }
        }
    }

    /// Notes something that `mend` would put right, and has it do so if that is wanted.
    fn found(
        &mut self,
        kind: Kind,
        what: &impl ToString,
        why: &str,
        mend: impl FnOnce() -> Result<()>,
    ) {
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

    /// Notes a file of ours that can not be used.
    fn unusable(&mut self, what: &impl ToString, error: &Error) {
        self.told(Kind::Corrupt, what, &error.chain(), error.hint_text().unwrap_or(LOOK_AGAIN));
    }

    /// Notes something that can not be looked at.
    fn unknown(&mut self, what: &impl ToString, error: &Error) {
        self.told(Kind::Unknown, what, &error.chain(), error.hint_text().unwrap_or(LOOK_AGAIN));
    }

    fn deadline() -> Instant {
        Instant::now() + PATIENCE
    }
}
