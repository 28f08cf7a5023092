//! Guests that QEMU paused because the filesystem of one of their images is full.
//!
//! ```text
//!            BLOCK_IO_ERROR, nospace, stop           check: space, still `io-error`
//!   running ───────────────────────────────► paused ────────────────────────────────► running
//!                                             │  ▲                           `cont`
//!                                             └──┘ check: no space; next after twice the time
//! ```
//!
//! QEMU pauses the guest and keeps the request (`werror=enospc`, its default for virtio-blk).
//! Nothing is lost, and the guest sees no error.
//!
//! The kernel has no event for new space. inotify and fanotify report changes of files. Space can
//! come from unrelated files of that filesystem, from a quota, or from a volume that was grown. So
//! the supervisor polls, but only while a guest is paused.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use crate::error::Result;
use crate::qmp::connection::Connection;
use crate::qmp::error::MonitorError;
use crate::qmp::query::Status;
use crate::qmp::{EventKind, power};

/// QEMU's RunState of a guest that was paused because of an I/O error.
const IO_ERROR_STATE: &str = "io-error";
/// How long after the pause the first check for space happens.
const FIRST_CHECK_DELAY: Duration = Duration::from_secs(1);
/// The longest time between two checks.
const LONGEST_CHECK_INTERVAL: Duration = Duration::from_secs(30);
/// Free bytes that are enough to continue. The guest would use up less before an operator has
/// noticed.
const ENOUGH_FREE_BYTES: u64 = 16 << 20;
/// How long statvfs(2) may take. It takes longer on a filesystem whose server does not answer.
const STATVFS_TIMEOUT: Duration = Duration::from_secs(5);

/// Whether the guest waits for space, and when to check again.
pub(super) struct EnospcWait {
    /// The block nodes with failed writes. Not empty while the guest is paused.
    nodes: BTreeSet<String>,
    interval: Duration,
    /// When the next check is due, or when the last one was.
    next_check: Option<Instant>,
    /// The result of a check that still runs, in a thread that may hang.
    pending_check: Option<oneshot::Receiver<bool>>,
}

impl Default for EnospcWait {
    fn default() -> Self {
        Self {
            nodes: BTreeSet::new(),
            interval: FIRST_CHECK_DELAY,
            next_check: None,
            pending_check: None,
        }
    }
}

impl EnospcWait {
    /// Returns the state of an adopted guest with this `status`. The supervisor missed the guest's
    /// events, so any image may have failed writes.
    pub(super) fn from_status(status: &Status) -> Self {
        let paused = status.state == IO_ERROR_STATE;
        Self {
            nodes: paused.then(String::new).into_iter().collect(),
            next_check: paused.then(Instant::now),
            ..Self::default()
        }
    }

    /// Updates the state after QEMU's event `event`.
    pub(super) fn on_event(&mut self, event: EventKind<'_>) {
        match event {
            EventKind::BlockIoError { node, action: "stop", no_space: true, .. } => {
                if self.nodes.is_empty() {
                    // A guest that fills the filesystem again at once waits longer each time.
                    let again =
                        self.next_check.is_some_and(|last| last.elapsed() < LONGEST_CHECK_INTERVAL);
                    self.interval = if again { self.next_interval() } else { FIRST_CHECK_DELAY };
                    self.next_check = Some(Instant::now() + self.interval);
                }
                self.nodes.insert(node.unwrap_or_default().to_owned());
            }
            // This supervisor or an operator sent `cont`.
            EventKind::Resume => self.nodes.clear(),
            _ => {}
        }
    }

    fn next_interval(&self) -> Duration {
        LONGEST_CHECK_INTERVAL.min(self.interval * 2)
    }

    /// Waits until the next check is due; forever if the guest does not wait for space.
    pub(super) async fn wait_for_check(&self) {
        match self.next_check {
            Some(next) if !self.nodes.is_empty() => tokio::time::sleep_until(next).await,
            _ => std::future::pending().await,
        }
    }

    /// Continues the guest if its filesystems have space, and returns whether it did. `pid` is
    /// QEMU's.
    pub(super) async fn resume_if_space(
        &mut self,
        monitor: &mut Connection,
        pid: i32,
    ) -> Result<bool, MonitorError> {
        self.interval = self.next_interval();
        self.next_check = Some(Instant::now() + self.interval);
        if power::status(monitor).await?.state != IO_ERROR_STATE {
            // Another client continued the guest and paused it again, for another reason.
            self.nodes.clear();
            return Ok(false);
        }
        if !self.has_space(monitor, pid).await? {
            return Ok(false);
        }
        power::cont(monitor).await?;
        Ok(true)
    }

    /// Returns whether the filesystems of all images with failed writes have space.
    async fn has_space(
        &mut self,
        monitor: &mut Connection,
        pid: i32,
    ) -> Result<bool, MonitorError> {
        let sets = monitor.execute(&qapi::qmp::query_fdsets {}).await?;
        let opened = sets.iter().flat_map(|set| &set.fds);
        let writable =
            opened.filter_map(|fd| Some((fd.opaque.as_deref()?.strip_prefix("rdwr:")?, fd.fd)));
        let has_fd = |node: &str| writable.clone().any(|(other, _)| other == node);
        // A node without a descriptor of its own, such as a job's, may use any of the files.
        let all = !self.nodes.iter().all(|node| has_fd(node));
        let failed = writable.clone().filter(|(node, _)| all || self.nodes.contains(*node));
        // Through the process's descriptors: they are the files QEMU writes, even if they were
        // renamed.
        let paths: Vec<_> = failed.map(|(_, fd)| format!("/proc/{pid}/fd/{fd}")).collect();
        let check = self.pending_check.get_or_insert_with(|| start_check(paths));
        let Ok(has_space) = timeout(STATVFS_TIMEOUT, check).await else { return Ok(false) };
        self.pending_check = None;
        Ok(has_space == Ok(true))
    }
}

/// Checks in a thread of its own, which may hang, whether the filesystems of all `paths` have
/// space.
fn start_check(paths: Vec<String>) -> oneshot::Receiver<bool> {
    let (sender, receiver) = oneshot::channel();
    std::thread::spawn(move || {
        let has_space = |path: &String| {
            rustix::fs::statvfs(path.as_str())
                .is_ok_and(|stat| stat.f_bavail.saturating_mul(stat.f_frsize) >= ENOUGH_FREE_BYTES)
        };
        let _ = sender.send(paths.iter().all(has_space));
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_SPACE: EventKind<'_> = EventKind::BlockIoError {
        node: Some("root"),
        operation: "write",
        action: "stop",
        no_space: true,
        reason: "",
    };

    #[tokio::test]
    async fn on_event_of_a_disk_filled_again_at_once_doubles_the_interval() {
        let mut enospc = EnospcWait::default();
        let mut waits = Vec::new();
        for _ in 0..8 {
            enospc.on_event(NO_SPACE);
            waits.push(enospc.interval.as_secs());
            enospc.on_event(NO_SPACE);
            enospc.next_check = Some(Instant::now());
            enospc.on_event(EventKind::Resume);
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 30, 30, 30]);
        enospc.next_check = Instant::now().checked_sub(LONGEST_CHECK_INTERVAL);
        enospc.on_event(NO_SPACE);
        assert_eq!(enospc.interval, FIRST_CHECK_DELAY);
    }

    #[tokio::test]
    async fn on_event_ignores_other_io_errors() {
        let mut enospc = EnospcWait::default();
        for (action, no_space) in [("report", true), ("stop", false)] {
            enospc.on_event(EventKind::BlockIoError {
                node: None,
                operation: "write",
                action,
                no_space,
                reason: "",
            });
            assert!(enospc.nodes.is_empty());
        }
        enospc.on_event(NO_SPACE);
        assert_eq!(enospc.nodes.len(), 1);
        enospc.on_event(EventKind::Resume);
        assert!(enospc.nodes.is_empty());
    }
}
