//! The backend of a disk in QEMU, below its device: jobs, block nodes, fd sets. Removes it.

use std::time::{Duration, Instant};

use qapi::qmp;

use super::{HotDisk, HotplugError, Inventory};
use crate::qmp::error::MonitorError;
use crate::qmp::job;
use crate::qmp::monitor::Monitor;
use crate::qmp::query::{Job, QueryJobs};
use crate::qmp::wire::printable;

/// Longest time between two attempts to delete a node that is in use. An event usually ends the
/// wait sooner.
const NODE_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Removes the jobs of `disk`, its nodes in `inventory`, and its fd sets. Tries each at least once,
/// even after `until`.
pub(super) fn remove(
    monitor: &mut Monitor,
    disk: &HotDisk,
    inventory: &Inventory,
    until: Instant,
) -> Result<(), HotplugError> {
    let nodes: Vec<&str> = disk.nodes().filter(|node| inventory.has_node(node)).collect();
    if !nodes.is_empty() {
        // Jobs are removed before nodes, so without a node no job remains either.
        cancel_jobs(monitor, disk, until)?;
    }
    for node in nodes {
        delete_node(monitor, node, until)?;
    }
    remove_fd_sets(monitor, &disk.opaque())?;
    Ok(())
}

/// Cancels the disk's own jobs. The client that started one held the disk's lock, as this caller
/// does now, so no client waits for the job.
fn cancel_jobs(monitor: &mut Monitor, disk: &HotDisk, until: Instant) -> Result<(), HotplugError> {
    let remaining = job::cancel_all(monitor, |id| disk.owns_job(id), until)?;
    if remaining.is_empty() { Ok(()) } else { Err(node_in_use(&disk.node, &remaining)) }
}

fn delete_node(monitor: &mut Monitor, node: &str, until: Instant) -> Result<(), HotplugError> {
    let command = qmp::blockdev_del { node_name: node.to_owned() };
    loop {
        match monitor.execute(&command) {
            Ok(_) => return Ok(()),
            // A node created inside its parent's JSON is deleted together with the parent.
            Err(error)
                if error.refused_with("Failed to find node")
                    || error.refused_with("not owned by the monitor") =>
            {
                return Ok(());
            }
            // The device uses the node for a moment after its deletion, or another disk's job uses
            // it.
            Err(error) if error.refused_with("in use") || error.refused_with("busy") => {}
            Err(error) => return Err(error.into()),
        }
        if Instant::now() >= until {
            return Err(node_in_use(node, &monitor.execute(&QueryJobs {})?));
        }
        monitor.wait_event(|_| true, until.min(Instant::now() + NODE_RETRY_INTERVAL))?;
    }
}

fn node_in_use(node: &str, jobs: &[Job]) -> HotplugError {
    HotplugError::NodeInUse {
        node: node.to_owned(),
        jobs: jobs.iter().map(|job| printable(&job.id)).collect(),
    }
}

/// Removes the fd sets with this `opaque`: those of clients killed before they used them, and of a
/// disk whose nodes are deleted.
fn remove_fd_sets(monitor: &mut Monitor, opaque: &str) -> Result<(), MonitorError> {
    for set in monitor.execute(&qmp::query_fdsets {})? {
        if set.fds.iter().any(|fd| fd.opaque.as_deref() == Some(opaque)) {
            monitor.execute(&qmp::remove_fd { fd: None, fdset_id: set.fdset_id })?;
        }
    }
    Ok(())
}
