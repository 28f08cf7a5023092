//! `bosh-qemu-cpi audit` and `gc`: what is not as the records say, reported or put right.

use std::io::Write;
use std::path::Path;

use serde_json::json;

use super::local;
use crate::cpi::audit::{Cure, Finding};
use crate::error::{Error, Result};

/// Prints one line for each finding, or with `as_json` one object. Whether everything is now as it should be.
pub fn run(file: Option<&Path>, mend: bool, as_json: bool, output: &mut dyn Write) -> Result<bool> {
    let cpi = local::cpi(file)?;
    let findings = if mend { cpi.gc()? } else { cpi.audit() };
    let clean = findings.iter().all(|finding| finding.cure == Cure::Mended);
    let text = if as_json {
        format!("{}\n", json!({"clean": clean, "findings": findings}))
    } else {
        lines(&findings)
    };
    output.write_all(text.as_bytes()).map_err(|e| Error::os("print what was found", e))?;
    Ok(clean)
}

fn lines(findings: &[Finding]) -> String {
    if findings.is_empty() {
        return "this host is as its records say\n".to_owned();
    }
    findings.iter().map(line).collect()
}

fn line(finding: &Finding) -> String {
    let cure = match &finding.cure {
        Cure::Gc => "`bosh-qemu-cpi gc` puts it right".to_owned(),
        Cure::Mended => "put right".to_owned(),
        Cure::Failed(report) => format!("FAILED: {report}"),
        Cure::Operator(next_step) => format!("yours to decide: {next_step}"),
    };
    format!("{}: {}. {cure}\n", finding.what, finding.why)
}
