//! Attaching and detaching a virtio-blk disk while the machine runs.
//!
//! A disk in QEMU is three things on top of each other, made from left to right and removed from right to left:
//!
//! ```text
//!   fd set "rdwr:<node>"  ──►  block nodes  ──►  device on a root port
//!   add-fd                     blockdev-add      device_add
//! ```
//!
//! Every step is found again by name, so both ways begin by looking at what QEMU has ([`Inventory`]) and never at
//! what a caller remembers. Whoever died between any two commands left a state that is one of these:
//!
//! ```text
//!   attach                                   detach
//!   ──────                                   ──────
//!     look ── device ──────► done              look ── no device ───────────────────┐
//!      │ no device                              │ device                            │
//!      │                                        ├─ prelaunch ──► NotStarted         │
//!     sweep leftovers                           ▼                                   │
//!      │                                  ┌─► device_del ── DeviceNotFound ─────────┤
//!     free port? ── none ──► NoFreeSlot   │     │ {}, "in the process of unplug",   │
//!      │                                  │     │ "busy"                            │
//!     add-fd, blockdev-add                │     ▼                                   │
//!      │        │ refused ► sweep, error  │   DEVICE_DELETED or one second          │
//!      ▼                                  │     │                                   │
//!     device_add ◄──────┐                 │   look ── no device ───────────────────►┤
//!      │      │occupied │                 │     │ device                            ▼
//!      ▼      └─ next ──┘                 └─────┤                                 sweep ──► done
//!     done       port                           └─ time is over ──► StillAttached
//!
//!   sweep: end the disk's own jobs, blockdev-del from the top ("in use": again), remove-fd
//! ```
//!
//! Facts behind it, seen on QEMU 10.0 with q35:
//! - ACPI hot-plug loses a `device_del` that comes before the guest's driver is up, so it is sent again every second.
//! - In `prelaunch` it must not be sent at all: the device then answers "already in the process of unplug" until the
//!   machine is reset.
//! - A guest can eject a device nobody asked for. Then the node is left, and the next attach or detach sweeps it.
//! - A request can not be taken back: a guest may serve one hours after [`StillAttached`](HotplugError::StillAttached).
//! - A leftover node is deleted and made anew, never used: its file may not be the caller's any more.
//! - Which ports are free is read from QEMU's object tree. `query-pci` shows the buses as the guest numbered them:
//!   before the firmware ran, every port looks empty.
//!
//! Two callers at once on one machine are excluded by the lock of the VM, above this layer.

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

/// Time between two requests to the guest to release a device.
const UNPLUG_RESEND_INTERVAL: Duration = Duration::from_secs(1);

/// The names of one disk in QEMU: whoever knows them can find and remove all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HotDisk {
    /// The device's id.
    pub device: String,
    /// The node the device uses. Its name also names the fd set.
    pub node: String,
    /// Nodes below, from top to bottom. They are the disk's alone.
    pub lower_nodes: Vec<String>,
}

impl HotDisk {
    /// What the disk's descriptors are called in `query-fdsets`, and must be called on the command line too.
    pub fn opaque(&self) -> String {
        format!("rdwr:{}", self.node)
    }

    /// How a job on this disk has to be called. Jobs of these names are ended when the disk is detached.
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

/// What [`attach`] needs to make a disk.
pub struct AttachRequest<'a> {
    /// Its names; what the JSON below says must agree.
    pub disk: &'a HotDisk,
    /// The image, opened in the access mode that QEMU will want (`O_DIRECT` too, for `cache.direct`). QEMU gets a
    /// copy: the caller closes its own, or the image stays locked after QEMU's end.
    pub file: BorrowedFd<'a>,
    /// Given the id of the fd set that holds the image, the arguments of each `blockdev-add`, from bottom to top.
    pub blockdevs: &'a dyn Fn(i64) -> Vec<Value>,
    /// The arguments of `device_add` but for `bus`.
    pub device: &'a Map<String, Value>,
    /// Root ports for hot-plug are called this and a number: `hotplug` for `hotplug0`, `hotplug1`, …
    pub port_prefix: &'a str,
}

/// What [`attach`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attached {
    /// The device is new, on this port. A guest that runs sees it in a moment, one that boots finds it then.
    New {
        /// The root port.
        port: String,
    },
    /// The device was there.
    Already,
}

/// Why a disk could not be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum HotplugError {
    /// Every root port has a device. Nothing was changed.
    #[error("all {slots} hot-plug slots of the machine are taken")]
    NoFreeSlot {
        /// How many there are.
        slots: usize,
    },
    /// The machine has not been started, so no guest can release anything. Nothing was changed.
    #[error("disk device '{device}' can not be unplugged before the machine is started")]
    NotStarted {
        /// The device.
        device: String,
    },
    /// The guest did not release the device in time. The disk is attached and works; the guest may still release it.
    #[error(
        "the guest did not release disk device '{device}': asked {asked} times, the machine is {state}{}",
        .refusal.as_ref().map(|r| format!(", qemu says: {r}")).unwrap_or_default()
    )]
    StillAttached {
        /// The device.
        device: String,
        /// How often it was asked.
        asked: u32,
        /// QEMU's RunState.
        state: String,
        /// What QEMU said to the last request instead of passing it on.
        refusal: Option<String>,
    },
    /// The device is gone, but something uses its node.
    #[error("block node '{node}' is still in use after its device is gone; block jobs: {}", list(.jobs))]
    NodeInUse {
        /// The node.
        node: String,
        /// The machine's block jobs, one of which may be why. Those that are not the disk's own were left alone.
        jobs: Vec<String>,
    },
    /// The monitor failed, or QEMU refused a step. A refused attach left nothing behind.
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
            HotplugError::NoFreeSlot { .. } => Error::new(ErrorKind::Conflict, message)
                .hint("raise the cloud property 'extra_disks_slots' and recreate the VM, or detach a disk"),
            HotplugError::NotStarted { .. } => Error::new(ErrorKind::Conflict, message).hint("start the VM first"),
            HotplugError::StillAttached { .. } => Error::new(ErrorKind::Timeout, message).hint(
                "the disk stays attached; see whether the guest has booted, reboot it if it hangs, and try again",
            ),
            HotplugError::NodeInUse { .. } => Error::new(ErrorKind::Timeout, message),
        }
    }
}

/// Attaches a disk; one that is attached stays as it is.
///
/// `until` limits the waiting for what an earlier caller left behind.
///
/// # Errors
/// See [`HotplugError`].
pub fn attach(
    monitor: &mut Monitor,
    wanted: &AttachRequest<'_>,
    until: Instant,
) -> Result<Attached, HotplugError> {
    let inventory = Inventory::query(monitor)?;
    if inventory.has_device(&wanted.disk.device) {
        return Ok(Attached::Already);
    }
    backend::remove(monitor, wanted.disk, &inventory, until)?;
    let ports = inventory.ports(wanted.port_prefix);
    let mut untried = ports.iter().copied();
    let port =
        next_free(monitor, &mut untried)?.ok_or(HotplugError::NoFreeSlot { slots: ports.len() })?;
    let plugged = open(monitor, wanted).map_err(HotplugError::from).and_then(|()| {
        plug(monitor, wanted, port, &mut untried)?
            .ok_or(HotplugError::NoFreeSlot { slots: ports.len() })
    });
    match plugged {
        Ok(port) => Ok(Attached::New { port: port.to_owned() }),
        Err(error) => {
            // What can not be swept now (QEMU is gone, the connection is poisoned) the next attach or detach sweeps.
            let remains = Inventory::query(monitor).map_err(HotplugError::from);
            if let Err(cleanup) =
                remains.and_then(|remains| backend::remove(monitor, wanted.disk, &remains, until))
            {
                tracing::warn!(device = wanted.disk.device, error = %cleanup, "a failed attach left something in qemu");
            }
            Err(error)
        }
    }
}

/// Makes the fd set and the nodes.
fn open(monitor: &mut Monitor, wanted: &AttachRequest<'_>) -> Result<(), MonitorError> {
    let set = monitor.add_fd(wanted.file, &wanted.disk.opaque())?;
    for blockdev in (wanted.blockdevs)(set) {
        monitor.raw("blockdev-add", &blockdev)?;
    }
    Ok(())
}

/// Makes the device on `port`, or on the next free one of `untried` if QEMU finds it occupied after all. Returns the
/// port, `None` when there is none left.
fn plug<'p>(
    monitor: &mut Monitor,
    wanted: &AttachRequest<'_>,
    port: &'p str,
    untried: &mut impl Iterator<Item = &'p str>,
) -> Result<Option<&'p str>, MonitorError> {
    let mut arguments = wanted.device.clone();
    let mut candidate = Some(port);
    while let Some(port) = candidate {
        arguments.insert("bus".into(), port.into());
        match monitor.raw("device_add", &Value::Object(arguments.clone())) {
            Ok(_) => return Ok(Some(port)),
            Err(error) if error.refused_with("already occupied") => {
                candidate = next_free(monitor, untried)?
            }
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// The first of `ports` that has no device.
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

/// Detaches a disk and removes all that is left of it. Of one that is not attached, removes what is left.
///
/// `until` limits the waiting for the guest. It should be some seconds before the monitor's own deadline, after
/// which nothing can be asked or removed any more.
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

/// Removes what QEMU has of an image that is no device's: its jobs, its nodes, its descriptors.
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

/// Asks the guest to release `device` until it did.
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
            // The disk's child is deleted first, in an event without `device`.
            matches!(event.kind(), EventKind::DeviceDeleted { device: Some(gone), .. } if gone == device)
        };
        monitor.wait_event(deleted, until.min(Instant::now() + UNPLUG_RESEND_INTERVAL))?;
        // The event may be of an earlier device of this name, and one for another client is not seen here.
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
    unreachable!("a request each second outlasts u32")
}

/// Whether the request stands although QEMU did not pass it on: an earlier one is pending, or the guest works on the
/// port (native PCIe hot-plug: its power indicator blinks).
fn is_pending(refused: &MonitorError) -> bool {
    refused.refused_with("already in the process of unplug") || refused.refused_with("busy")
}
