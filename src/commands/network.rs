//! `bosh-qemu-cpi network plan|apply|remove`: shows, creates and removes the host's part of the
//! networks (bridges, addresses, firewall rules) without a VM.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use super::local;
use crate::cpi;
use crate::cpi::context::Context;
use crate::cpi::network::host::{self, HostNetwork};
use crate::error::{Error, Result};
use crate::net::plan::Keeper;

/// The action of a `network` command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Print what is missing.
    Plan,
    /// Create what is missing and keep the networks when they have no VM.
    Apply,
    /// Remove the networks, those in use with their last VM.
    Remove,
}

/// Applies `action` to the networks named in `only`, or to all if it is empty. Prints a paragraph
/// for each network or, with `as_json`, one object. Returns true if no network has an error.
///
/// # Errors
/// If the configuration of a network is invalid, a name in `only` is unknown, or the state
/// directory cannot be read.
pub fn run(
    config: Option<&Path>,
    action: Action,
    only: &[String],
    as_json: bool,
    output: &mut dyn Write,
) -> Result<bool> {
    let cx = local::context(config)?;
    let networks = host::list(&cx, only)?;
    let mut reports: Vec<_> =
        networks.iter().map(|network| report(&cx, action, network)).collect::<Result<_>>()?;
    list_shared_changes_once(&mut reports);
    let text = if as_json {
        let networks: Vec<_> = reports.iter().map(Report::json).collect();
        format!("{}\n", json!({ "networks": networks }))
    } else {
        reports.iter().map(Report::text).collect()
    };
    output.write_all(text.as_bytes()).map_err(|e| Error::os("print the networks", e))?;
    Ok(reports.iter().all(|report| report.error.is_none()))
}

/// State of a network whose bridge the operator made.
const OPERATORS: &str = "managed by the operator";
/// State of a network that `apply` keeps.
const KEPT: &str = "kept without VMs";

/// The output for one network.
struct Report<'a> {
    network: &'a HostNetwork,
    state: &'static str,
    /// Changes that are needed; after `apply`, the changes that were made.
    changes: Vec<String>,
    findings: Vec<crate::net::host_firewalls::Finding>,
    error: Option<String>,
}

fn report<'a>(cx: &Context, action: Action, network: &'a HostNetwork) -> Result<Report<'a>> {
    let cpi_owns_bridge = matches!(network.segment.keeper, Keeper::Cpi { .. });
    let state = match (cpi_owns_bridge, network.pinned) {
        (false, _) => OPERATORS,
        (true, true) => KEPT,
        (true, false) => "removed with its last VM",
    };
    let mut report =
        Report { network, state, changes: Vec::new(), findings: Vec::new(), error: None };
    if action == Action::Remove && cpi::network::is_managed(cx, &network.segment.network)? {
        report.state = "managed by BOSH, delete_network removes it";
        return Ok(report);
    }
    if action == Action::Remove {
        match host::remove(cx, network) {
            Ok(_) if !cpi_owns_bridge => {}
            Ok(true) => report.state = "removed",
            Ok(false) => report.state = "in use, removed with its last VM",
            Err(error) => report.error = Some(error.report()),
        }
        return Ok(report);
    }
    let lack = host::lack(network)?;
    report.findings = lack.findings;
    if lack.filter {
        report.changes.push("nft tables 'bosh-qemu-guard' for all VMs".to_owned());
    }
    match lack.changes {
        Ok(changes) => report.changes.extend(changes.iter().map(ToString::to_string)),
        Err(error) => report.error = Some(error.report()),
    }
    if action == Action::Apply && report.error.is_none() {
        report.error = host::apply(cx, network).err().map(|error| error.report());
        report.state = if cpi_owns_bridge && network.configured { KEPT } else { state };
    }
    Ok(report)
}

/// Keeps a change that several networks need, such as forwarding, only in the first report.
fn list_shared_changes_once(reports: &mut [Report<'_>]) {
    let mut listed = BTreeSet::new();
    for report in reports {
        report.changes.retain(|change| listed.insert(change.clone()));
    }
}

impl Report<'_> {
    fn json(&self) -> Value {
        let segment = &self.network.segment;
        json!({
            "network": segment.network, "bridge": segment.bridge, "vlan": segment.vlan,
            "state": self.state, "changes": self.changes, "findings": self.findings,
            "error": self.error,
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
            add("!", &format!("{}\nfix: {}", finding.cause, finding.cure));
        }
        self.error.iter().for_each(|error| add("!", error));
        text
    }
}
