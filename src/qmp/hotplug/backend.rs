//! Removing what is left of a disk that has no device: jobs, nodes, descriptors.

use std::time::{Duration, Instant};

use qapi::qmp;

use super::{HotDisk, HotplugError, Inventory};
use crate::qmp::error::MonitorError;
use crate::qmp::job;
use crate::qmp::monitor::Monitor;
use crate::qmp::query::{Job, QueryJobs};
use crate::qmp::wire::printable;

/// Longest pause before a node that is in use is tried again. Most often an event ends it sooner.
const NODE_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Removes the jobs of `disk`, what `inventory` shows of its nodes, and its descriptors. Each is tried at least once, also
/// after `until`.
pub(super) fn remove(
    monitor: &mut Monitor,
    disk: &HotDisk,
    inventory: &Inventory,
    until: Instant,
) -> Result<(), HotplugError> {
    let nodes: Vec<&str> = disk.nodes().filter(|node| inventory.has_node(node)).collect();
    if !nodes.is_empty() {
        // Jobs go before nodes, so where there is no node, a sweep that was cut short has ended the jobs.
        end_jobs(monitor, disk, until)?;
    }
    for node in nodes {
        delete_node(monitor, node, until)?;
    }
    remove_fd_sets(monitor, &disk.opaque())?;
    Ok(())
}

/// Ends the disk's own jobs. Whoever started one held the disk's lock, which is ours now: nobody waits for it any more.
fn end_jobs(monitor: &mut Monitor, disk: &HotDisk, until: Instant) -> Result<(), HotplugError> {
    let left = job::cancel_all(monitor, |id| disk.owns_job(id), until)?;
    if left.is_empty() { Ok(()) } else { Err(in_use(&disk.node, &left)) }
}

fn delete_node(monitor: &mut Monitor, node: &str, until: Instant) -> Result<(), HotplugError> {
    let command = qmp::blockdev_del { node_name: node.to_owned() };
    loop {
        match monitor.execute(&command) {
            Ok(_) => return Ok(()),
            // A node that was made inside its parent's JSON goes with the parent, and only so.
            Err(error)
                if error.refused_with("Failed to find node")
                    || error.refused_with("not owned by the monitor") =>
            {
                return Ok(());
            }
            // By the device, for the moment between its deletion and its end, or by a job that is not the disk's.
            Err(error) if error.refused_with("in use") || error.refused_with("busy") => {}
            Err(error) => return Err(error.into()),
        }
        if Instant::now() >= until {
            return Err(in_use(node, &monitor.execute(&QueryJobs {})?));
        }
        monitor.wait_event(|_| true, until.min(Instant::now() + NODE_RETRY_INTERVAL))?;
    }
}

fn in_use(node: &str, jobs: &[Job]) -> HotplugError {
    HotplugError::NodeInUse {
        node: node.to_owned(),
        jobs: jobs.iter().map(|job| printable(&job.id)).collect(),
    }
}

/// Closes QEMU's copies of descriptors called `opaque`: of clients that died before they used them, and of a disk
/// whose nodes are gone.
fn remove_fd_sets(monitor: &mut Monitor, opaque: &str) -> Result<(), MonitorError> {
    for set in monitor.execute(&qmp::query_fdsets {})? {
        if set.fds.iter().any(|fd| fd.opaque.as_deref() == Some(opaque)) {
            monitor.execute(&qmp::remove_fd { fd: None, fdset_id: set.fdset_id })?;
        }
    }
    Ok(())
}
