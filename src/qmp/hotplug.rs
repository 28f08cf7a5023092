//! Plugging a virtio disk into a running VM and out of it.
//!
//! ```text
//!             add-fd         blockdev-add ×2        device_add
//!   absent ───────────► fd set ───────────► nodes ───────────► plugged
//!     ▲                                       ▲                   │ device_del, again every second:
//!     │  remove-fd             blockdev-del ×2│                   │ ACPI drops a request the guest's
//!     └─────────────── fd set ◄───────────────┴── unplugged ◄─────┘ driver is not there to hear
//! ```
//!
//! Both directions first ask QEMU where they are and go on from there. So they are right after a call that was killed
//! between any two commands, and after a guest that ejected the disk itself. Facts behind them (QEMU 10.0):
//!
//! - DEVICE_DELETED comes twice for a disk; only the one whose `device` is the disk's id counts. It can be missed (it
//!   goes to whoever is connected), so the device is asked for on each turn as well.
//! - device_del before the guest runs wedges the device until a reset. It is refused here.
//! - "already in the process of unplug" and "guest is busy" mean wait, not failure.
//! - A guest that never answers keeps the disk. The request stays pending in QEMU; a later attach looks first.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use qapi::qmp;
use serde_json::{Value, json};

use super::connection::MonitorError;
use super::monitor::Monitor;
use crate::error::{Error, ErrorKind, Result};

/// How often a guest is asked again.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a node may stay in use after its device is gone: requests in flight are finished.
const IN_USE: Duration = Duration::from_millis(100);

/// A disk to plug in.
pub struct Disk<'a> {
    /// Id of the device, and of its format node.
    pub id: &'a str,
    /// The opened image.
    pub file: OwnedFd,
    /// By which a later call recognizes the descriptor.
    pub opaque: String,
    /// The nodes on the descriptor set of that number, lowest first.
    pub nodes: &'a dyn Fn(i64) -> Vec<Value>,
    /// The device, but for its bus.
    pub device: Value,
    /// Ports it may go into, the preferred first.
    pub ports: Vec<String>,
}

/// Plugs the disk in; one that is plugged in already is left as it is.
///
/// # Errors
/// Nothing of the disk is left in QEMU if it fails, unless QEMU itself went away or silent.
pub fn attach(monitor: &mut Monitor, disk: &Disk<'_>) -> Result<()> {
    if is_attached(monitor, disk.id)? {
        return Ok(());
    }
    let names: Vec<String> =
        (disk.nodes)(0).iter().filter_map(|n| n["node-name"].as_str().map(str::to_owned)).collect();
    clear(monitor, &names, &disk.opaque, Instant::now() + AGAIN)?;
    let added = monitor.raw_with_fd("add-fd", json!({"opaque": disk.opaque}), disk.file.as_fd())?;
    let fdset = added["fdset-id"].as_i64().unwrap_or(-1);
    let plugged = plug(monitor, disk, fdset);
    if plugged.is_err() {
        clear(monitor, &names, &disk.opaque, Instant::now() + AGAIN)?;
    }
    plugged
}

fn plug(monitor: &mut Monitor, disk: &Disk<'_>, fdset: i64) -> Result<()> {
    for node in (disk.nodes)(fdset) {
        monitor.raw("blockdev-add", node)?;
    }
    let mut device = disk.device.clone();
    for port in &disk.ports {
        if is_occupied(monitor, port)? {
            continue;
        }
        device["bus"] = port.as_str().into();
        match monitor.raw("device_add", device.clone()) {
            Ok(_) => return Ok(()),
            Err(MonitorError::Refused { description, .. }) if description.contains("already occupied") => {}
            Err(error) => return Err(error.into()),
        }
    }
    let count = disk.ports.len();
    Err(Error::new(ErrorKind::NotSupported, format!("all {count} hot-plug slots of the VM are taken"))
        .hint("recreate it with a larger cloud property 'extra_disks_slots'"))
}

/// Unplugs the disk `id` and forgets its `nodes` (lowest first) and the descriptor `opaque`. Returns once the guest
/// has let go and the image is unlocked; a disk that is not there is fine.
///
/// # Errors
/// [`ErrorKind::Timeout`] if the guest has not answered by `deadline`: the disk is still plugged in.
pub fn detach(monitor: &mut Monitor, id: &str, nodes: &[String], opaque: &str, deadline: Instant) -> Result<()> {
    unplug(monitor, id, deadline)?;
    clear(monitor, nodes, opaque, deadline.max(Instant::now() + AGAIN))
}

fn unplug(monitor: &mut Monitor, id: &str, deadline: Instant) -> Result<()> {
    while is_attached(monitor, id)? {
        let status = monitor.raw("query-status", Value::Null)?;
        if status["status"] == "prelaunch" {
            return Err(Error::new(ErrorKind::Conflict, "the VM has not been started yet"));
        }
        if Instant::now() >= deadline {
            let state = status["status"].as_str().unwrap_or("unknown").to_owned();
            return Err(Error::new(
                ErrorKind::Timeout,
                format!("the guest ({state}) did not let go of disk '{id}' in time"),
            )
            .hint("it may still boot, hang or have the disk in use; the disk stays attached, try again"));
        }
        match monitor.execute(&qmp::device_del { id: id.to_owned() }) {
            Ok(_) => {}
            Err(MonitorError::Refused { class, .. }) if class == "DeviceNotFound" => continue,
            // Already asked, or busy: wait like everybody else.
            Err(MonitorError::Refused { description, .. }) => tracing::debug!(%description, "not yet"),
            Err(error) => return Err(error.into()),
        }
        monitor.wait_for(deadline.min(Instant::now() + AGAIN), |event| {
            let about = matches!(event.name.as_str(), "DEVICE_DELETED" | "DEVICE_UNPLUG_GUEST_ERROR");
            (about && event.data["device"] == id).then_some(())
        })?;
    }
    Ok(())
}

/// Whether QEMU has the device `id`.
pub fn is_attached(monitor: &mut Monitor, id: &str) -> Result<bool> {
    let devices = monitor.raw("qom-list", json!({"path": "/machine/peripheral"}))?;
    Ok(devices.as_array().is_some_and(|devices| devices.iter().any(|device| device["name"] == id)))
}

/// Asked of the bus itself: query-pci knows a port's devices only once the firmware has numbered the buses.
fn is_occupied(monitor: &mut Monitor, port: &str) -> Result<bool> {
    let children = monitor.raw("qom-list", json!({"path": format!("/machine/peripheral/{port}/{port}")}))?;
    let is_child = |property: &Value| property["name"].as_str().is_some_and(|name| name.starts_with("child["));
    Ok(children.as_array().is_some_and(|properties| properties.iter().any(is_child)))
}

/// Removes nodes and descriptors that are left of a disk whose device is gone or never came.
fn clear(monitor: &mut Monitor, nodes: &[String], opaque: &str, deadline: Instant) -> Result<()> {
    let known = monitor.raw("query-named-block-nodes", json!({"flat": true}))?;
    let exists = |name: &str| known.as_array().is_some_and(|nodes| nodes.iter().any(|node| node["node-name"] == name));
    // A format node holds its protocol node, so the last made goes first.
    for name in nodes.iter().rev().filter(|name| exists(name)) {
        delete_node(monitor, name, deadline)?;
    }
    let sets = monitor.raw("query-fdsets", Value::Null)?;
    for set in sets.as_array().into_iter().flatten() {
        let ours = |fd: &Value| fd["opaque"] == opaque;
        if set["fds"].as_array().is_some_and(|fds| fds.iter().any(ours)) {
            monitor.raw("remove-fd", json!({"fdset-id": set["fdset-id"]}))?;
        }
    }
    Ok(())
}

fn delete_node(monitor: &mut Monitor, name: &str, deadline: Instant) -> Result<()> {
    loop {
        match monitor.raw("blockdev-del", json!({"node-name": name})) {
            Ok(_) => return Ok(()),
            Err(MonitorError::Refused { description, .. }) if description.contains("Failed to find node") => {
                return Ok(());
            }
            Err(MonitorError::Refused { description, .. })
                if description.contains("in use") && Instant::now() < deadline =>
            {
                // QEMU has no event for the last request of a node; any event, or a moment, and it is asked again.
                monitor.wait_for(Instant::now() + IN_USE, |_| Some(()))?;
            }
            Err(error) => return Err(error.into()),
        }
    }
}
