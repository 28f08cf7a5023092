//! `bosh-qemu-cpi host start` and `host stop`: all VMs at the host's boot and shutdown.
//! `contrib/systemd/bosh-qemu-cpi.service` runs them.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use crate::commands::local;
use crate::cpi::vm::host_boot::{self, Outcome, State};
use crate::error::{Error, Result};

/// Starts every VM that should run. Prints one line for each or, with `json`, one object. Returns
/// true if no VM failed.
pub fn start(file: Option<&Path>, json: bool, output: &mut dyn Write) -> Result<bool> {
    print(&host_boot::start_all(&local::context(file)?)?, json, output)
}

/// Shuts every VM down, and ends the QEMU of a guest that is not off within `timeout`. Output and
/// result as for [`start`].
pub fn stop(
    file: Option<&Path>,
    timeout: Duration,
    json: bool,
    output: &mut dyn Write,
) -> Result<bool> {
    print(&host_boot::stop_all(&local::context(file)?, timeout)?, json, output)
}

fn print(outcomes: &[Outcome], json: bool, output: &mut dyn Write) -> Result<bool> {
    let passed = !outcomes.iter().any(|outcome| matches!(outcome.state, State::Failed(_)));
    let text = if json {
        format!("{}\n", json!({"passed": passed, "vms": outcomes}))
    } else {
        lines(outcomes)
    };
    output.write_all(text.as_bytes()).map_err(|e| Error::os("print the VMs", e))?;
    Ok(passed)
}

fn lines(outcomes: &[Outcome]) -> String {
    if outcomes.is_empty() {
        return "no VMs on this host\n".to_owned();
    }
    outcomes.iter().map(line).collect()
}

fn line(outcome: &Outcome) -> String {
    let state = match &outcome.state {
        State::Started => "started".to_owned(),
        State::Adopted => "running, got a new supervisor".to_owned(),
        State::Running => "running".to_owned(),
        State::Stopped => "stopped".to_owned(),
        State::Off(why) => format!("off: {why}"),
        State::Failed(report) => format!("FAILED: {report}"),
    };
    let name = outcome.name.as_deref().unwrap_or("-");
    format!("{:<24} {name:<24} {:7.3} s  {state}\n", outcome.vm, outcome.seconds)
}
