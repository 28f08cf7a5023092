//! `bosh-qemu-cpi network plan|apply|remove`: the host's side of the networks, looked at and made without a VM.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use super::this_host;
use crate::cpi::Cpi;
use crate::cpi::host_networks::HostNetwork;
use crate::error::{Error, Result};
use crate::net::plan::Keeper;

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    /// Print what is missing.
    Plan,
    /// Make it, to stay.
    Apply,
    /// Remove it.
    Remove,
}

/// Does it for the networks called `only`, or for all, and prints a paragraph for each, or with `as_json` one object.
/// Whether all went well.
///
/// # Errors
/// If the networks do not fit together, or the state directory can not be read.
pub fn run(
    config: Option<&Path>,
    deed: Deed,
    only: &[String],
    as_json: bool,
    output: &mut dyn Write,
) -> Result<bool> {
    let cpi = this_host::cpi(config)?;
    let networks = cpi.host_networks(only)?;
    let mut reports: Vec<_> =
        networks.iter().map(|network| report(&cpi, deed, network)).collect::<Result<_>>()?;
    say_once(&mut reports);
    let text = if as_json {
        let networks: Vec<_> = reports.iter().map(Report::json).collect();
        format!("{}\n", json!({ "networks": networks }))
    } else {
        reports.iter().map(Report::text).collect()
    };
    output.write_all(text.as_bytes()).map_err(|e| Error::os("print the networks", e))?;
    Ok(reports.iter().all(|report| report.error.is_none()))
}

/// What is to be said of one network.
struct Report<'a> {
    network: &'a HostNetwork,
    state: &'static str,
    /// What is missing, or was.
    changes: Vec<String>,
    findings: Vec<crate::net::coexist::Finding>,
    error: Option<String>,
}

fn report<'a>(cpi: &Cpi, deed: Deed, network: &'a HostNetwork) -> Result<Report<'a>> {
    let ours = matches!(network.segment.keeper, Keeper::Cpi { .. });
    let kept = match (ours, network.kept) {
        (false, _) => "the operator's",
        (true, true) => "stays without VMs",
        (true, false) => "goes with its last VM",
    };
    let mut report =
        Report { network, state: kept, changes: Vec::new(), findings: Vec::new(), error: None };
    if deed == Deed::Remove && cpi.is_managed(&network.segment.network)? {
        report.state = "goes with delete_network";
        return Ok(report);
    }
    if deed == Deed::Remove {
        match cpi.remove_network(network) {
            Ok(_) if !ours => {}
            Ok(true) => report.state = "removed",
            Ok(false) => report.state = "has VMs and goes with the last",
            Err(error) => report.error = Some(error.report()),
        }
        return Ok(report);
    }
    let lack = cpi.lack(network)?;
    report.findings = lack.findings;
    if lack.guard {
        report.changes.push("nft tables 'bosh-qemu-guard', with all VMs".to_owned());
    }
    match lack.changes {
        Ok(changes) => report.changes.extend(changes.iter().map(ToString::to_string)),
        Err(error) => report.error = Some(error.report()),
    }
    if deed == Deed::Apply && report.error.is_none() {
        report.error = cpi.apply_network(network).err().map(|error| error.report());
        report.state = if ours && network.configured { "stays without VMs" } else { kept };
    }
    Ok(report)
}

/// What several networks lack, such as forwarding, comes with the first of them.
fn say_once(reports: &mut [Report<'_>]) {
    let mut said = BTreeSet::new();
    for report in reports {
        report.changes.retain(|change| said.insert(change.clone()));
    }
}

impl Report<'_> {
    fn json(&self) -> Value {
        let segment = &self.network.segment;
        json!({
            "network": segment.network, "bridge": segment.bridge, "vlan": segment.vlan, "state": self.state,
            "changes": self.changes, "findings": self.findings, "error": self.error,
        })
    }

    fn text(&self) -> String {
        let segment = &self.network.segment;
        let mut text = format!("{}: bridge {}, {}\n", segment.network, segment.bridge, self.state);
        let mut add = |mark: &str, lines: &str| {
            for (index, line) in lines.lines().enumerate() {
                text.push_str(&format!("  {} {line}\n", if index == 0 { mark } else { " " }));
            }
        };
        self.changes.iter().for_each(|change| add("+", change));
        for finding in &self.findings {
            add("!", &format!("{}\ncure: {}", finding.cause, finding.cure));
        }
        self.error.iter().for_each(|error| add("!", error));
        text
    }
}
