//! `bosh-qemu-cpi host status`: version, VMs, accelerator and free resources of each configured
//! host, or of this host if none is configured.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::commands::table::table;
use crate::config::{self, Config, TransportKind};
use crate::cpi::capacity::report::{self, HostQuery, HostReport};
use crate::cpi::context::Context;
use crate::error::{Error, Result};
use crate::log;
use crate::remote::client::Client;
use crate::schema::{plain, printable};
use crate::units::Bytes;

/// How long one host may take to answer, connecting included.
const HOST_REPORT_TIMEOUT: Duration = Duration::from_secs(30);

/// One host and its report.
struct Line {
    name: String,
    draining: bool,
    report: Result<HostReport>,
}

/// Asks all hosts in parallel and prints a table or, with `json`, an array. Returns true if every
/// host answers.
pub fn run(file: Option<&Path>, json: bool, output: &mut dyn Write) -> Result<bool> {
    let file = config::path(file);
    let config = Config::load(file.as_deref())?;
    log::init(&config.log);
    let hosts: Vec<_> = if config.hosts.is_empty() {
        vec![(Client::for_single_host(config.transport.clone()), false)]
    } else {
        config.hosts.iter().map(|entry| (Client::for_entry(entry), entry.draining)).collect()
    };
    let ask = |host: &Client| match host.transport.kind {
        TransportKind::Local => {
            report::report(&Context::new(config.clone(), file.clone()), &HostQuery::default())
        }
        _ => host
            .report(&HostQuery::default(), Instant::now() + HOST_REPORT_TIMEOUT)
            .map_err(|failure| failure.error),
    };
    let lines: Vec<_> = std::thread::scope(|threads| {
        let asked: Vec<_> = hosts.iter().map(|(host, _)| threads.spawn(|| ask(host))).collect();
        let reports = asked.into_iter().map(|report| report.join().expect("no panic"));
        let named = hosts.iter().zip(reports);
        named
            .map(|((host, draining), report)| Line {
                name: host.name.clone(),
                draining: *draining,
                report,
            })
            .collect()
    });
    let text = if json {
        let array: Vec<_> = lines.iter().map(Line::json).collect();
        serde_json::to_string_pretty(&array).expect("plain data") + "\n"
    } else {
        let head = ["HOST", "VERSION", "VMS", "ACCEL", "CPUS", "LARGEST VM", "FREE DISK", "STATE"]
            .map(str::to_owned);
        table(&std::iter::once(head).chain(lines.iter().map(Line::cells)).collect::<Vec<_>>())
    };
    output.write_all(text.as_bytes()).map_err(|e| Error::os("print the hosts", e))?;
    Ok(lines.iter().all(|line| line.report.is_ok()))
}

impl Line {
    fn json(&self) -> Value {
        match &self.report {
            Ok(report) => json!({
                "host": self.name, "draining": self.draining, "version": report.version,
                "vms": report.vms, "accelerator": report.accelerator, "cpus": report.cpus,
                "largest_vm": report.memory, "free": report.space,
            }),
            Err(error) => {
                json!({"host": self.name, "draining": self.draining, "error": error.report()})
            }
        }
    }

    fn cells(&self) -> [String; 8] {
        let state = if self.draining { "draining" } else { "ok" };
        match &self.report {
            Ok(report) => {
                // Empty as long as the host has no state directory.
                let free = report.space.values().copied().max();
                [
                    self.name.clone(),
                    printable(&report.version),
                    report.vms.to_string(),
                    plain(&report.accelerator).replace('\n', " "),
                    report.cpus.to_string(),
                    report.memory.rounded(),
                    free.map_or_else(|| "-".to_owned(), Bytes::rounded),
                    state.to_owned(),
                ]
            }
            Err(error) => {
                let mut cells = std::array::from_fn(|_| "-".to_owned());
                (cells[0], cells[7]) = (self.name.clone(), error.report().replace('\n', " "));
                cells
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_in_a_hosts_report_do_not_reach_the_terminal() {
        let (version, accelerator) = ("\u{1b}[2J".to_owned(), "kvm\r\n\u{9b}1m".to_owned());
        let report = Ok(HostReport { version, accelerator, ..HostReport::default() });
        let cells = Line { name: "kvm-1".to_owned(), draining: false, report }.cells();
        assert!(!cells.concat().contains(char::is_control), "{cells:?}");
    }
}
