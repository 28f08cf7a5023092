//! `bosh-qemu-cpi vm list`: prints every VM of this host and its state.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::local;
use super::table::table;
use crate::cid::VmCid;
use crate::error::{Error, Result};
use crate::qmp::job;
use crate::store::record::{Attachment, AttachmentPhase, Nic};
use crate::store::{Phase, Store, VmRecord};
use crate::supervisor::{Status, status};

/// How long one VM's state may take. A healthy QEMU answers in a millisecond, or after the turn of
/// a call that copies a disk.
const VM_STATUS_TIMEOUT: Duration = Duration::from_secs(2);
const _: () = assert!(VM_STATUS_TIMEOUT.as_millis() > job::MONITOR_TURN_TIMEOUT.as_millis());
/// VMs that are examined in parallel, so that the timeouts of QEMUs that hang do not add up.
const PARALLEL: usize = 32;

/// One VM of the list.
struct Line {
    cid: VmCid,
    /// The record and the VM's state, or the reason why they cannot be determined.
    known: Result<(VmRecord, Status)>,
}

/// Prints a table or, with `as_json`, an array.
pub fn list(config: Option<&Path>, as_json: bool, output: &mut dyn Write) -> Result<()> {
    let (config, _) = local::config(config)?;
    let store = Store::from_config(&config);
    let mut cids = store.list::<VmRecord>()?;
    cids.sort();
    let lines: Vec<_> = cids.chunks(PARALLEL).flat_map(|cids| examine_all(&store, cids)).collect();
    let text = if as_json {
        let array: Vec<_> = lines.iter().map(Line::json).collect();
        serde_json::to_string_pretty(&array).expect("plain data") + "\n"
    } else {
        table(&rows(&lines))
    };
    output.write_all(text.as_bytes()).map_err(|e| Error::os("print the VMs", e))
}

fn examine_all(store: &Store, cids: &[VmCid]) -> Vec<Line> {
    std::thread::scope(|threads| {
        let handles: Vec<_> =
            cids.iter().map(|cid| threads.spawn(|| examine(store, cid))).collect();
        handles.into_iter().filter_map(|handle| handle.join().expect("no panic")).collect()
    })
}

/// Returns `None` if the VM was deleted after it was listed.
fn examine(store: &Store, cid: &VmCid) -> Option<Line> {
    let known = store.find::<VmRecord>(cid).transpose()?.and_then(|vm| {
        let status = status(&store.vm(cid), vm.run, Instant::now() + VM_STATUS_TIMEOUT)?;
        Ok((vm, status))
    });
    Some(Line { cid: cid.clone(), known })
}

fn network(nic: &Nic) -> Value {
    let tap = nic.tap().map(|(tap, _)| tap);
    json!({"name": nic.network, "mac": nic.mac, "tap": tap})
}

impl Line {
    fn json(&self) -> Value {
        let (vm, status) = match &self.known {
            Ok(known) => known,
            Err(error) => {
                return json!({"cid": self.cid, "state": "unknown", "reason": error.report()});
            }
        };
        let mut line = json!({
            "cid": self.cid,
            "phase": vm.phase,
            "accelerator": vm.machine.accel,
            "memory_mib": vm.machine.ram.get(),
            "cpus": vm.machine.cpus,
            "disks": vm.disks,
            "networks": vm.nics.iter().map(network).collect::<Vec<_>>(),
            "metadata": vm.metadata,
        });
        let Value::Object(status) = serde_json::to_value(status).expect("plain data") else {
            return line;
        };
        line.as_object_mut().expect("an object").extend(status);
        line
    }

    /// The VM's row of the table.
    fn cells(&self) -> [String; 8] {
        let cid = self.cid.to_string();
        let (vm, status) = match &self.known {
            Ok(known) => known,
            Err(error) => {
                return [
                    cid,
                    dash(),
                    format!("unknown: {error}"),
                    dash(),
                    dash(),
                    dash(),
                    dash(),
                    dash(),
                ];
            }
        };
        let mut state = status.state.as_str().to_owned();
        if let Some(reason) = &status.reason {
            state = format!("{state}: {reason}");
        }
        match vm.phase {
            Phase::Ready => {}
            Phase::Creating => state = format!("being created, {state}"),
            Phase::Deleting => state = format!("being deleted, {state}"),
        }
        let or_dash = |words: Vec<String>| if words.is_empty() { dash() } else { words.join(",") };
        [
            cid,
            vm.name().map_or_else(dash, |name| name.escape_debug().to_string()),
            state,
            vm.machine.accel.as_str().to_owned(),
            status.pid.map_or_else(dash, |pid| pid.to_string()),
            vm.machine.ram.bytes().rounded(),
            or_dash(vm.disks.iter().map(attachment).collect()),
            or_dash(vm.nics.iter().map(|nic| nic.network.escape_debug().to_string()).collect()),
        ]
    }
}

fn dash() -> String {
    "-".to_owned()
}

fn attachment(attachment: &Attachment) -> String {
    match attachment.phase {
        AttachmentPhase::Attached => attachment.disk.to_string(),
        AttachmentPhase::Attaching => format!("{} (attaching)", attachment.disk),
        AttachmentPhase::Detaching => format!("{} (detaching)", attachment.disk),
    }
}

fn rows(lines: &[Line]) -> Vec<[String; 8]> {
    let head =
        ["CID", "NAME", "STATE", "ACCEL", "PID", "MEMORY", "DISKS", "NETWORKS"].map(str::to_owned);
    std::iter::once(head).chain(lines.iter().map(Line::cells)).collect()
}
