//! Events: messages that QEMU sends unasked.
//!
//! An event keeps its name and data unchanged, so an unknown event is valid. [`Event::kind`] parses
//! the events that this program acts on.

use std::time::{Duration, SystemTime};

use serde_json::Value;

/// One event. Its text comes from QEMU and, in part, from the guest.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// `SHUTDOWN`, `DEVICE_DELETED`, …
    pub name: String,
    /// The event's own fields; null if it has none.
    pub data: Value,
    /// When QEMU sent it, by the host's clock. `None` if QEMU could not read the clock.
    pub time: Option<SystemTime>,
}

/// The parsed events, borrowing from an [`Event`]. Fields as in QEMU's QAPI schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind<'a> {
    /// The machine shuts down.
    Shutdown {
        /// Whether the guest caused it.
        guest: bool,
        /// `guest-shutdown`, `host-qmp-quit`, `host-signal`, `guest-panic`, …; empty before 4.0.
        reason: &'a str,
    },
    /// The machine was reset and continues.
    Reset {
        /// Whether the guest caused it.
        guest: bool,
        /// `guest-reset`, `host-qmp-system-reset`, …
        reason: &'a str,
    },
    /// vCPUs stopped.
    Stop,
    /// vCPUs run again.
    Resume,
    /// A client pressed the power button. The guest may not have noticed.
    Powerdown,
    /// A device was removed. A disk sends this twice, first for a child without `device`. Only
    /// after the event with `device` can the disk's node be deleted.
    DeviceDeleted {
        /// The device's id.
        device: Option<&'a str>,
        /// Its path in QEMU's object tree.
        path: &'a str,
    },
    /// The guest refused to release a device (QEMU 6.2).
    DeviceUnplugGuestError {
        /// The device's id.
        device: Option<&'a str>,
        /// Its path in QEMU's object tree.
        path: &'a str,
    },
    /// The guest's kernel panicked and notified pvpanic.
    GuestPanicked {
        /// `pause`, `poweroff` or `run`.
        action: &'a str,
    },
    /// Reading or writing an image failed on the host.
    BlockIoError {
        /// The node, if it has a name.
        node: Option<&'a str>,
        /// `read` or `write`.
        operation: &'a str,
        /// `stop` (the machine waits for `cont`), `report` (the guest got the error) or `ignore`.
        action: &'a str,
        /// Whether the host's filesystem is full.
        no_space: bool,
        /// The host's error text.
        reason: &'a str,
    },
    /// The watchdog device expired.
    Watchdog {
        /// QEMU's reaction: `reset`, `shutdown`, `none`, …
        action: &'a str,
    },
    /// Any other event.
    Other,
}

impl Event {
    /// Parses the event. A field that is missing or has another type is empty.
    pub fn kind(&self) -> EventKind<'_> {
        let optional = |key: &str| self.data.get(key).and_then(Value::as_str);
        let text = |key: &str| optional(key).unwrap_or_default();
        let flag = |key: &str| self.data.get(key).and_then(Value::as_bool).unwrap_or_default();
        match self.name.as_str() {
            "SHUTDOWN" => EventKind::Shutdown { guest: flag("guest"), reason: text("reason") },
            "RESET" => EventKind::Reset { guest: flag("guest"), reason: text("reason") },
            "STOP" => EventKind::Stop,
            "RESUME" => EventKind::Resume,
            "POWERDOWN" => EventKind::Powerdown,
            "DEVICE_DELETED" => {
                EventKind::DeviceDeleted { device: optional("device"), path: text("path") }
            }
            "DEVICE_UNPLUG_GUEST_ERROR" => {
                EventKind::DeviceUnplugGuestError { device: optional("device"), path: text("path") }
            }
            "GUEST_PANICKED" => EventKind::GuestPanicked { action: text("action") },
            "BLOCK_IO_ERROR" => EventKind::BlockIoError {
                node: optional("node-name"),
                operation: text("operation"),
                action: text("action"),
                no_space: flag("nospace"),
                reason: text("reason"),
            },
            "WATCHDOG" => EventKind::Watchdog { action: text("action") },
            _ => EventKind::Other,
        }
    }
}

/// QEMU's timestamp: time since the epoch, −1 if QEMU could not read the clock.
#[derive(Debug, Clone, Copy, serde::Deserialize)]
pub(super) struct Timestamp {
    seconds: i64,
    microseconds: i64,
}

impl Timestamp {
    pub(super) fn time(self) -> Option<SystemTime> {
        let seconds = Duration::from_secs(self.seconds.try_into().ok()?);
        let rest = Duration::from_micros(self.microseconds.try_into().ok()?);
        SystemTime::UNIX_EPOCH.checked_add(seconds)?.checked_add(rest)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(name: &str, data: Value) -> Event {
        Event { name: name.into(), data, time: None }
    }

    #[test]
    fn deleted_disk_is_distinguished_from_its_child() {
        let child =
            event("DEVICE_DELETED", json!({"path": "/machine/peripheral/d/virtio-backend"}));
        let disk = event("DEVICE_DELETED", json!({"device": "d", "path": "/machine/peripheral/d"}));
        assert!(matches!(child.kind(), EventKind::DeviceDeleted { device: None, .. }));
        assert!(matches!(disk.kind(), EventKind::DeviceDeleted { device: Some("d"), .. }));
    }

    #[test]
    fn missing_or_mistyped_fields_are_empty() {
        assert_eq!(
            event("SHUTDOWN", Value::Null).kind(),
            EventKind::Shutdown { guest: false, reason: "" }
        );
        let odd =
            event("BLOCK_IO_ERROR", json!({"nospace": "yes", "node-name": 7, "action": "stop"}));
        let EventKind::BlockIoError { node: None, action: "stop", no_space: false, .. } =
            odd.kind()
        else {
            panic!("{:?}", odd.kind());
        };
        assert_eq!(event("NETDEV_VHOST_USER_CONNECTED", json!({})).kind(), EventKind::Other);
    }

    #[test]
    fn timestamps_cannot_overflow() {
        assert_eq!(Timestamp { seconds: -1, microseconds: -1 }.time(), None);
        assert_eq!(Timestamp { seconds: i64::MAX, microseconds: i64::MAX }.time(), None);
        let time = Timestamp { seconds: 1, microseconds: 500_000 }.time();
        assert_eq!(time, Some(SystemTime::UNIX_EPOCH + Duration::from_millis(1500)));
    }
}
