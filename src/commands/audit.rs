//! `bosh-qemu-cpi audit` and `gc`: prints how this host differs from its records, and repairs it.

use std::io::Write;
use std::path::Path;

use serde_json::json;

use super::local;
use crate::audit::{self, Cure, Finding};
use crate::error::{Error, Result};

/// Audits this host, with `repair` repairs it too, and prints one line for each finding or, with
/// `as_json`, one object. Returns true if no finding is left unrepaired.
pub fn run(
    file: Option<&Path>,
    repair: bool,
    as_json: bool,
    output: &mut dyn Write,
) -> Result<bool> {
    let cx = local::context(file)?;
    let findings = if repair { audit::gc(&cx)? } else { audit::audit(&cx) };
    let clean = findings.iter().all(|finding| finding.cure == Cure::Repaired);
    let text = if as_json {
        format!("{}\n", json!({"clean": clean, "findings": findings}))
    } else {
        lines(&findings)
    };
    output.write_all(text.as_bytes()).map_err(|e| Error::os("print the findings", e))?;
    Ok(clean)
}

fn lines(findings: &[Finding]) -> String {
    if findings.is_empty() {
        return "no findings: this host matches its records\n".to_owned();
    }
    findings.iter().map(line).collect()
}

fn line(finding: &Finding) -> String {
    let cure = match &finding.cure {
        Cure::Gc => "`bosh-qemu-cpi gc` repairs it".to_owned(),
        Cure::Repaired => "repaired".to_owned(),
        Cure::Failed(report) => format!("FAILED to repair it: {report}"),
        Cure::Operator(next_step) => format!("needs your decision: {next_step}"),
    };
    format!("{}: {}. {cure}\n", finding.what, finding.why)
}
