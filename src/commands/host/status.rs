//! `bosh-qemu-cpi host status`: what each host of the configuration has, this one if there is no other.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::commands::table::table;
use crate::config::{self, Config, TransportKind};
use crate::cpi::Cpi;
use crate::cpi::offer::{Offer, Wish};
use crate::error::{Error, Result};
use crate::log;
use crate::remote::caller::Host;
use crate::schema::{plain, printable};
use crate::units::Bytes;

/// How long a host is waited for.
const PATIENCE: Duration = Duration::from_secs(30);

/// One host, and what it says.
struct Line {
    name: String,
    draining: bool,
    offer: Result<Offer>,
}

/// Prints a table, or with `json` an array. Whether all hosts answer.
pub fn run(file: Option<&Path>, json: bool, output: &mut dyn Write) -> Result<bool> {
    let file = config::path(file);
    let config = Config::load(file.as_deref())?;
    log::init(&config.log);
    let hosts: Vec<_> = if config.hosts.is_empty() {
        vec![(Host::only(config.transport.clone()), false)]
    } else {
        config.hosts.iter().map(|entry| (Host::of(entry), entry.draining)).collect()
    };
    let ask = |host: &Host| match host.transport.kind {
        TransportKind::Local => Cpi::new(config.clone(), file.clone()).offer(&Wish::default()),
        _ => host.offer(&Wish::default(), Instant::now() + PATIENCE).map_err(|untold| untold.error),
    };
    let lines: Vec<_> = std::thread::scope(|threads| {
        let asked: Vec<_> = hosts.iter().map(|(host, _)| threads.spawn(|| ask(host))).collect();
        let offers = asked.into_iter().map(|offer| offer.join().expect("no panic"));
        let named = hosts.iter().zip(offers);
        named
            .map(|((host, draining), offer)| Line {
                name: host.name.clone(),
                draining: *draining,
                offer,
            })
            .collect()
    });
    let text = if json {
        let array: Vec<_> = lines.iter().map(Line::json).collect();
        serde_json::to_string_pretty(&array).expect("plain data") + "\n"
    } else {
        let head = ["HOST", "VERSION", "VMS", "UNDER", "CPUS", "LARGEST VM", "FREE", "STATE"]
            .map(str::to_owned);
        table(&std::iter::once(head).chain(lines.iter().map(Line::cells)).collect::<Vec<_>>())
    };
    output.write_all(text.as_bytes()).map_err(|e| Error::os("print the hosts", e))?;
    Ok(lines.iter().all(|line| line.offer.is_ok()))
}

impl Line {
    fn json(&self) -> Value {
        match &self.offer {
            Ok(offer) => json!({
                "host": self.name, "draining": self.draining, "version": offer.version, "vms": offer.vms,
                "accelerator": offer.accelerator, "cpus": offer.cpus, "largest_vm": offer.memory, "free": offer.space,
            }),
            Err(error) => {
                json!({"host": self.name, "draining": self.draining, "error": error.report()})
            }
        }
    }

    fn cells(&self) -> [String; 8] {
        let mib = |bytes: Bytes| format!("{} MiB", bytes.get() >> 20);
        let state = if self.draining { "draining" } else { "ok" };
        match &self.offer {
            Ok(offer) => [
                self.name.clone(),
                printable(&offer.version),
                offer.vms.to_string(),
                plain(&offer.accelerator).replace('\n', " "),
                offer.cpus.to_string(),
                mib(offer.memory),
                mib(offer.space.values().copied().max().unwrap_or_default()),
                state.to_owned(),
            ],
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
    fn what_a_host_says_of_itself_moves_no_cursor() {
        let (version, accelerator) = ("\u{1b}[2J".to_owned(), "kvm\r\n\u{9b}1m".to_owned());
        let offer = Ok(Offer { version, accelerator, ..Offer::default() });
        let cells = Line { name: "kvm-1".to_owned(), draining: false, offer }.cells();
        assert!(!cells.concat().contains(char::is_control), "{cells:?}");
    }
}
