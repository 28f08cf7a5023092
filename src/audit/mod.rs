//! What on this host contradicts the records, and its repair: `bosh-qemu-cpi audit` and `gc`.
//!
//! ```text
//!   records             unreadable records, interrupted creates and deletes, other files
//!   attachments         which VM has which disk: interrupted calls, contradictory records
//!   images              missing images, files in pools that no record names, the key of disks
//!   vms                 VMs that are off and should run, VMs without a supervisor
//!   reservations        uids, addresses and ports of VMs without the link that reserves them
//!   networks            what networks of running VMs lack, damaged pins, unused bridges
//!   vms_without_record  what is left of VMs that do not exist: QEMU, taps, rules, uids …
//!   stray_files         locks and temporary files that belong to no object
//! ```
//!
//! Every verb settles what it meets on its own cid, so calls do not need this. It is for the
//! operator who wants to know, and for objects that no call will name again. The rules:
//!
//! - An object whose lock a call holds is no finding.
//! - `audit` writes nothing (`locks`). What it cannot inspect is a finding, and it goes on.
//! - `gc` removes only what certainly belongs to this program and is certainly of no use. This
//!   program writes records first and removes them last, so a file without a record is the
//!   operator's to decide about.

mod attachments;
mod images;
mod locks;
mod networks;
mod records;
mod reservations;
mod stray_files;
mod vms;
mod vms_without_record;

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::cpi::context::Context;
use crate::error::{Error, Result};

/// How long the repair of one object may take.
const REPAIR_TIMEOUT: Duration = Duration::from_secs(60);
const AUDIT_AGAIN: &str = "correct that, and run `audit` again";

/// Something on this host that contradicts the records.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What kind of finding it is.
    pub kind: Kind,
    /// The object: a cid, a path, a name.
    pub what: String,
    /// What is wrong with it.
    pub why: String,
    /// What repairs it.
    pub cure: Cure,
}

/// Kinds of findings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A create or a delete was interrupted.
    Unfinished,
    /// A record, or another file of this program, cannot be used.
    Corrupt,
    /// Something cannot be inspected.
    Unknown,
    /// An object has files but no record.
    NoRecord,
    /// A VM is off and should run.
    Down,
    /// A VM runs without a supervisor.
    Unsupervised,
    /// The Director may not have received the object's cid.
    Unacknowledged,
    /// An attach or a detach was interrupted.
    Unsettled,
    /// A VM has a uid, address or port without a reservation.
    Unreserved,
    /// Something is left of an object that does not exist.
    Orphan,
    /// A network lacks something that its VMs need.
    Network,
    /// An image does not exist.
    NoImage,
}

/// What repairs a finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cure {
    /// `gc` repairs it.
    Gc,
    /// `gc` has repaired it.
    Repaired,
    /// `gc` could not repair it, for this reason.
    Failed(String),
    /// The operator must decide; this is the next step.
    Operator(String),
}

/// Looks for everything on this host that contradicts the records. Writes nothing.
pub fn audit(cx: &Context) -> Vec<Finding> {
    let mut audit = Audit { cx, repair: false, findings: Vec::new() };
    match cx.store.is_initialized() {
        Ok(_) if cx.store.state_dir().exists() => audit.everything(),
        Ok(_) => {}
        // The files of an unknown schema may mean anything.
        Err(error) => audit.unusable(&cx.store.schema_file().display(), &error),
    }
    audit.findings
}

/// The same, and repairs what it finds.
///
/// # Errors
/// As [`Store::prepare`](crate::store::Store::prepare), and if the state directory cannot be
/// written.
pub fn gc(cx: &Context) -> Result<Vec<Finding>> {
    let mut audit = Audit { cx, repair: true, findings: Vec::new() };
    cx.store.ensure_mounted()?;
    if cx.store.state_dir().exists() {
        cx.store.prepare()?;
        cx.store.ensure_writable()?;
        audit.everything();
    }
    Ok(audit.findings)
}

/// A part of the audit.
type Part = fn(&mut Audit<'_>) -> Result<()>;

/// All parts, with whether they ask the run directory which VMs run.
const PARTS: [(&str, bool, Part); 8] = [
    ("records", false, |audit| audit.records()),
    ("attachments", false, |audit| audit.attachments()),
    ("images", false, |audit| audit.images()),
    ("VMs", true, |audit| audit.vms()),
    ("reservations", false, |audit| audit.reservations()),
    ("networks", true, |audit| audit.networks()),
    ("VMs without a record", true, |audit| audit.vms_without_record()),
    ("stray files", false, |audit| audit.stray_files()),
];

struct Audit<'a> {
    cx: &'a Context,
    /// Whether findings are repaired.
    repair: bool,
    findings: Vec<Finding>,
}

impl Audit<'_> {
    fn everything(&mut self) {
        let run_dir = self.cx.store.ensure_run_dir_matches();
        if let Err(error) = &run_dir {
            self.unusable(&"run_dir", error);
        }
        for (what, asks_run_dir, part) in PARTS {
            if asks_run_dir && run_dir.is_err() {
                continue;
            }
            if let Err(error) = part(self) {
                self.unknown(&what, &error);
            }
        }
    }

    /// Adds a finding that `repair` repairs, and runs it if this is `gc`.
    fn found(
        &mut self,
        kind: Kind,
        what: &impl ToString,
        why: &str,
        repair: impl FnOnce() -> Result<()>,
    ) {
        let cure = match self.repair.then(repair) {
            None => Cure::Gc,
            Some(Ok(())) => Cure::Repaired,
            Some(Err(error)) => Cure::Failed(error.report()),
        };
        self.findings.push(Finding { kind, what: what.to_string(), why: why.to_owned(), cure });
    }

    /// Adds a finding that the operator must repair.
    fn for_operator(&mut self, kind: Kind, what: &impl ToString, why: &str, next_step: &str) {
        let (what, why) = (what.to_string(), why.to_owned());
        self.findings.push(Finding { kind, what, why, cure: Cure::Operator(next_step.to_owned()) });
    }

    /// Adds a file that cannot be used.
    fn unusable(&mut self, what: &impl ToString, error: &Error) {
        self.for_operator(
            Kind::Corrupt,
            what,
            &error.chain(),
            error.hint_text().unwrap_or(AUDIT_AGAIN),
        );
    }

    /// Adds something that cannot be inspected.
    fn unknown(&mut self, what: &impl ToString, error: &Error) {
        self.for_operator(
            Kind::Unknown,
            what,
            &error.chain(),
            error.hint_text().unwrap_or(AUDIT_AGAIN),
        );
    }

    fn deadline() -> Instant {
        Instant::now() + REPAIR_TIMEOUT
    }
}
