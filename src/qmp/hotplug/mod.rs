//! Attaches and detaches a virtio-blk disk while the machine runs.
//!
//! A disk in QEMU has three layers. Attaching creates them from left to right, detaching removes
//! them from right to left:
//!
//! ```text
//!   fd set "rdwr:<node>"  ──►  block nodes  ──►  device on a root port
//!   add-fd                     blockdev-add      device_add
//! ```
//!
//! Fd set and block nodes are the disk's backend. Each layer is found by its name. So both
//! operations begin by querying QEMU ([`Inventory`]) and rely on no caller's memory. A caller
//! killed between two commands leaves one of these states:
//!
//! ```text
//!   attach                                   detach
//!   ──────                                   ──────
//!     query ── device ─────► done              query ── no device ──────────────────┐
//!      │ no device                              │ device                            │
//!      │                                        ├─ prelaunch ──► NotStarted         │
//!     remove old backend                        ▼                                   │
//!      │                                  ┌─► device_del ── DeviceNotFound ─────────┤
//!     free port? ── none ──► NoFreeSlot   │     │ {}, "in the process of unplug",   │
//!      │                                  │     │ "busy"                            │
//!     add-fd, blockdev-add                │     ▼                                   │
//!      │     │ refused ► remove backend   │   DEVICE_DELETED or one second          │
//!      ▼                                  │     │                                   │
//!     device_add ◄──────┐                 │   query ── no device ──────────────────►┤
//!      │      │occupied │                 │     │ device                            ▼
//!      ▼      └─ next ──┘                 └─────┤                      remove backend ─► done
//!     done       port                           └─ `until` passed ──► StillAttached
//!
//!   remove backend: cancel the disk's own jobs, blockdev-del from the top, remove-fd
//! ```
//!
//! Facts observed on QEMU 10.0 with q35:
//! - ACPI hot-plug loses a `device_del` sent before the guest's driver is up, so it is sent again
//!   every second.
//! - In `prelaunch` no `device_del` may be sent: the device then answers "already in the process of
//!   unplug" until the machine is reset.
//! - A guest can eject a device without being asked. The backend remains; the next attach or detach
//!   removes it.
//! - A `device_del` cannot be revoked: a guest may obey one hours after
//!   [`StillAttached`](HotplugError::StillAttached).
//! - An old block node is deleted and created again, never reused: it may have another file open.
//! - QEMU's object tree shows which ports are free. `query-pci` shows the buses as the guest
//!   numbered them: before the firmware ran, every port looks empty.
//!
//! The VM's lock, above this layer, excludes concurrent callers on one machine.

mod backend;
mod inventory;
#[cfg(test)]
mod tests;

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use qapi::qmp;
use serde_json::{Map, Value};

pub use inventory::Inventory;

use super::error::MonitorError;
use super::event::EventKind;
use super::monitor::Monitor;
use super::query::QueryStatus;
use super::wire::printable;
use crate::error::{Error, ErrorKind};

/// Time between two `device_del` commands for the same device.
const UNPLUG_RESEND_INTERVAL: Duration = Duration::from_secs(1);

/// The names of one disk in QEMU, by which every part of it can be found and removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HotDisk {
    /// The device's id.
    pub device: String,
    /// The node that the device uses. Its name is also part of the fd set's `opaque`.
    pub node: String,
    /// The nodes below it, from top to bottom. No other disk uses them.
    pub lower_nodes: Vec<String>,
}

impl HotDisk {
    /// The `opaque` of the disk's fds in `query-fdsets`. The command line must use it too.
    pub fn opaque(&self) -> String {
        format!("rdwr:{}", self.node)
    }

    /// The id for a job on this disk. Detaching the disk cancels jobs with such ids.
    pub fn job(&self, purpose: &str) -> String {
        format!("{}.{purpose}", self.device)
    }

    fn owns_job(&self, id: &str) -> bool {
        id.strip_prefix(&self.device).is_some_and(|rest| rest.starts_with('.'))
    }

    /// All nodes, from top to bottom.
    fn nodes(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.node).chain(&self.lower_nodes).map(String::as_str)
    }
}

/// Parameters of [`attach`].
pub struct AttachRequest<'a> {
    /// The disk's names. The JSON below must use the same ones.
    pub disk: &'a HotDisk,
    /// The image, opened with the access mode that QEMU uses (with `O_DIRECT` for `cache.direct`).
    /// QEMU gets a copy. The caller must close its own, or the image stays locked after QEMU's end.
    pub file: BorrowedFd<'a>,
    /// Returns the arguments of each `blockdev-add`, from bottom to top, for the id of the image's
    /// fd set.
    pub blockdevs: &'a dyn Fn(i64) -> Vec<Value>,
    /// The arguments of `device_add` without `bus`.
    pub device: &'a Map<String, Value>,
    /// Name of the hot-plug root ports without their number: `hotplug` for `hotplug0`, `hotplug1`,
    /// …
    pub port_prefix: &'a str,
}

/// Result of [`attach`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attached {
    /// The device was added to this port. A running guest sees it soon, a booting one during its
    /// boot.
    New {
        /// The root port.
        port: String,
    },
    /// The device existed already.
    Already,
}

/// Why a disk could not be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum HotplugError {
    /// Every root port has a device. Nothing was changed.
    #[error("all {slots} hot-plug slots of the machine are in use")]
    NoFreeSlot {
        /// Number of slots.
        slots: usize,
    },
    /// The guest has not been started, so it cannot release a device. Nothing was changed.
    #[error("disk device '{device}' cannot be unplugged before the machine is started")]
    NotStarted {
        /// The device.
        device: String,
    },
    /// The guest did not release the device in time. The disk stays attached and works; the guest
    /// may still release it.
    #[error(
        "the guest did not release disk device '{device}': asked {asked} times, \
         the machine is {state}{}",
        .refusal.as_ref().map(|r| format!(", qemu says: {r}")).unwrap_or_default()
    )]
    StillAttached {
        /// The device.
        device: String,
        /// Number of `device_del` commands sent.
        asked: u32,
        /// QEMU's RunState.
        state: String,
        /// QEMU's error if it refused the last request.
        refusal: Option<String>,
    },
    /// The device is removed, but its node is in use.
    #[error(
        "block node '{node}' is still in use after its device was removed; block jobs: {}",
        list(.jobs)
    )]
    NodeInUse {
        /// The node.
        node: String,
        /// The machine's block jobs, one of which may use the node. Jobs of other disks were not
        /// cancelled.
        jobs: Vec<String>,
    },
    /// The monitor failed, or QEMU refused a step. A refused attach leaves nothing behind.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
}

fn list(jobs: &[String]) -> String {
    if jobs.is_empty() { "none".to_owned() } else { jobs.join(", ") }
}

impl From<HotplugError> for Error {
    fn from(error: HotplugError) -> Self {
        let message = error.to_string();
        match error {
            HotplugError::Monitor(error) => error.into(),
            HotplugError::NoFreeSlot { .. } => Error::new(ErrorKind::Conflict, message).hint(
                "raise the cloud property 'extra_disks_slots' and recreate the VM, or detach \
                     a disk",
            ),
            HotplugError::NotStarted { .. } => {
                Error::new(ErrorKind::Conflict, message).hint("start the VM first")
            }
            HotplugError::StillAttached { .. } => Error::new(ErrorKind::Timeout, message).hint(
                "the disk stays attached: check whether the guest has booted, reboot it if it \
                 hangs, and repeat the call",
            ),
            HotplugError::NodeInUse { .. } => Error::new(ErrorKind::Timeout, message),
        }
    }
}

/// Attaches a disk. A disk that is attached does not change.
///
/// `until` limits the wait for the removal of an old backend.
///
/// # Errors
/// See [`HotplugError`].
pub fn attach(
    monitor: &mut Monitor,
    request: &AttachRequest<'_>,
    until: Instant,
) -> Result<Attached, HotplugError> {
    let inventory = Inventory::query(monitor)?;
    if inventory.has_device(&request.disk.device) {
        return Ok(Attached::Already);
    }
    backend::remove(monitor, request.disk, &inventory, until)?;
    let ports = inventory.ports(request.port_prefix);
    let mut untried = ports.iter().copied();
    let port =
        next_free(monitor, &mut untried)?.ok_or(HotplugError::NoFreeSlot { slots: ports.len() })?;
    let plugged = open(monitor, request).map_err(HotplugError::from).and_then(|()| {
        plug(monitor, request, port, &mut untried)?
            .ok_or(HotplugError::NoFreeSlot { slots: ports.len() })
    });
    match plugged {
        Ok(port) => Ok(Attached::New { port: port.to_owned() }),
        Err(error) => {
            // If this fails too (QEMU exited, the connection is poisoned), the next attach or
            // detach removes the backend.
            let remains = Inventory::query(monitor).map_err(HotplugError::from);
            if let Err(cleanup) =
                remains.and_then(|remains| backend::remove(monitor, request.disk, &remains, until))
            {
                tracing::warn!(
                    device = request.disk.device,
                    error = %cleanup,
                    "the backend of a failed attach remains in qemu"
                );
            }
            Err(error)
        }
    }
}

/// Creates the fd set and the block nodes.
fn open(monitor: &mut Monitor, request: &AttachRequest<'_>) -> Result<(), MonitorError> {
    let set = monitor.add_fd(request.file, &request.disk.opaque())?;
    for blockdev in (request.blockdevs)(set) {
        monitor.raw("blockdev-add", &blockdev)?;
    }
    Ok(())
}

/// Creates the device on `port`, or on the next free one of `untried` if QEMU finds it occupied.
/// Returns the port, or `None` if no port is free.
fn plug<'p>(
    monitor: &mut Monitor,
    request: &AttachRequest<'_>,
    port: &'p str,
    untried: &mut impl Iterator<Item = &'p str>,
) -> Result<Option<&'p str>, MonitorError> {
    let mut arguments = request.device.clone();
    let mut candidate = Some(port);
    while let Some(port) = candidate {
        arguments.insert("bus".into(), port.into());
        match monitor.raw("device_add", &Value::Object(arguments.clone())) {
            Ok(_) => return Ok(Some(port)),
            Err(error) if error.refused_with("already occupied") => {
                candidate = next_free(monitor, untried)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Returns the first of `ports` that has no device.
fn next_free<'p>(
    monitor: &mut Monitor,
    ports: &mut impl Iterator<Item = &'p str>,
) -> Result<Option<&'p str>, MonitorError> {
    for port in ports {
        if inventory::is_port_free(monitor, port)? {
            return Ok(Some(port));
        }
    }
    Ok(None)
}

/// Detaches a disk and removes its backend. For a disk that is not attached, removes a remaining
/// backend.
///
/// `until` limits the wait for the guest. It should be some seconds before the monitor's deadline,
/// after which no command can be sent.
///
/// # Errors
/// See [`HotplugError`].
pub fn detach(monitor: &mut Monitor, disk: &HotDisk, until: Instant) -> Result<(), HotplugError> {
    let inventory = Inventory::query(monitor)?;
    if inventory.has_device(&disk.device) {
        if monitor.execute(&QueryStatus {})?.is_prelaunch() {
            return Err(HotplugError::NotStarted { device: disk.device.clone() });
        }
        unplug(monitor, &disk.device, until)?;
    }
    backend::remove(monitor, disk, &inventory, until)
}

/// Removes the backend of an image without a device: its jobs, its nodes, its fd sets.
///
/// # Errors
/// See [`HotplugError`].
pub fn remove_backend(
    monitor: &mut Monitor,
    image: &HotDisk,
    until: Instant,
) -> Result<(), HotplugError> {
    let inventory = Inventory::query(monitor)?;
    backend::remove(monitor, image, &inventory, until)
}

/// Sends `device_del` until the guest has released `device`.
fn unplug(monitor: &mut Monitor, device: &str, until: Instant) -> Result<(), HotplugError> {
    let request = qmp::device_del { id: device.to_owned() };
    for asked in 1.. {
        let refusal = match monitor.execute(&request) {
            Ok(_) => None,
            Err(error) if error.is_device_not_found() => return Ok(()),
            Err(error @ MonitorError::Refused { .. }) if is_pending(&error) => {
                Some(error.to_string())
            }
            Err(error) => return Err(error.into()),
        };
        let deleted = |event: &super::Event| {
            // QEMU deletes the disk's child first, with an event without `device`.
            let kind = event.kind();
            matches!(kind, EventKind::DeviceDeleted { device: Some(id), .. } if id == device)
        };
        monitor.wait_event(deleted, until.min(Instant::now() + UNPLUG_RESEND_INTERVAL))?;
        // The event may belong to an earlier device of this name, and another client's connection
        // may have received this one.
        if !inventory::has_device(monitor, device)? {
            return Ok(());
        }
        if Instant::now() >= until {
            let state = printable(&monitor.execute(&QueryStatus {})?.state);
            return Err(HotplugError::StillAttached {
                device: device.to_owned(),
                asked,
                state,
                refusal,
            });
        }
    }
    unreachable!("a request each second does not overflow u32")
}

/// Whether an unplug request is pending although QEMU refused this one: an earlier one is pending,
/// or the guest works on the port (native PCIe hot-plug: its power indicator blinks).
fn is_pending(refused: &MonitorError) -> bool {
    refused.refused_with("already in the process of unplug") || refused.refused_with("busy")
}
