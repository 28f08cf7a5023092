//! A guest that waits because the filesystem of one of its images is full.
//!
//! ```text
//!              BLOCK_IO_ERROR, nospace, stop                   look: room, still `io-error`
//!   running ─────────────────────────────────► waiting ────────────────────────────────────► cont, running
//!                                               │   ▲
//!                                               └───┘ look: no room; the next look after twice the time
//! ```
//!
//! QEMU pauses the guest and keeps the request (`werror=enospc`, its default for virtio-blk): nothing is lost, and the
//! guest sees no error. No event tells of room: inotify and fanotify know files, and room comes from files on that
//! filesystem that are nobody's we know, from a quota, from a volume that was grown. So the supervisor looks, and only
//! while a guest waits.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use crate::error::Result;
use crate::qmp::connection::Connection;
use crate::qmp::error::MonitorError;
use crate::qmp::query::Status;
use crate::qmp::{EventKind, power};

/// QEMU's RunState of such a guest.
const IO_ERROR_STATE: &str = "io-error";
/// How long after the pause the first look is.
const FIRST_CHECK_DELAY: Duration = Duration::from_secs(1);
/// The longest time between two looks.
const LONGEST_CHECK_INTERVAL: Duration = Duration::from_secs(30);
/// Bytes that are room. Less would be used up before an operator has noticed.
const ENOUGH_FREE_BYTES: u64 = 16 << 20;
/// A statvfs(2) that takes longer is of a filesystem that does not answer, such as a server's that is gone.
const STATVFS_TIMEOUT: Duration = Duration::from_secs(5);

/// Whether the guest waits for room, and when to look again.
pub(super) struct EnospcWait {
    /// The block nodes that could not be written.
    nodes: BTreeSet<String>,
    interval: Duration,
    /// When to look next, or was last.
    next_check: Option<Instant>,
    /// An answer that is still to come, from a thread that may hang.
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
    /// That of a guest whose `status` was pending_check by who did not see the events: any of its images may be meant.
    pub(super) fn from_status(status: &Status) -> Self {
        let waits = status.state == IO_ERROR_STATE;
        Self {
            nodes: waits.then(String::new).into_iter().collect(),
            next_check: waits.then(Instant::now),
            ..Self::default()
        }
    }

    /// Takes notice of an event.
    pub(super) fn on_event(&mut self, event: EventKind<'_>) {
        match event {
            EventKind::BlockIoError { node, action: "stop", no_space: true, .. } => {
                if self.nodes.is_empty() {
                    // A guest that goes on and fills the disk again at once waits longer each time.
                    let again =
                        self.next_check.is_some_and(|last| last.elapsed() < LONGEST_CHECK_INTERVAL);
                    self.interval = if again { self.next_interval() } else { FIRST_CHECK_DELAY };
                    self.next_check = Some(Instant::now() + self.interval);
                }
                self.nodes.insert(node.unwrap_or_default().to_owned());
            }
            // By us, or by an operator.
            EventKind::Resume => self.nodes.clear(),
            _ => {}
        }
    }

    fn next_interval(&self) -> Duration {
        LONGEST_CHECK_INTERVAL.min(self.interval * 2)
    }

    /// Waits for the time of the next look; for ever if no guest waits.
    pub(super) async fn wait_for_check(&self) {
        match self.next_check {
            Some(next) if !self.nodes.is_empty() => tokio::time::sleep_until(next).await,
            _ => std::future::pending().await,
        }
    }

    /// Has the guest go on if there is room. Whether it was told to.
    pub(super) async fn resume_if_space(
        &mut self,
        monitor: &mut Connection,
        pid: i32,
    ) -> Result<bool, MonitorError> {
        self.interval = self.next_interval();
        self.next_check = Some(Instant::now() + self.interval);
        if power::status(monitor).await?.state != IO_ERROR_STATE {
            // Somebody let it go on and stopped it again, for reasons of their own.
            self.nodes.clear();
            return Ok(false);
        }
        if !self.has_space(monitor, pid).await? {
            return Ok(false);
        }
        power::cont(monitor).await?;
        Ok(true)
    }

    /// Whether the filesystems of all images that could not be written have room.
    async fn has_space(
        &mut self,
        monitor: &mut Connection,
        pid: i32,
    ) -> Result<bool, MonitorError> {
        let sets = monitor.execute(&qapi::qmp::query_fdsets {}).await?;
        let opened = sets.iter().flat_map(|set| &set.fds);
        let writable =
            opened.filter_map(|fd| Some((fd.opaque.as_deref()?.strip_prefix("rdwr:")?, fd.fd)));
        let known = |node: &str| writable.clone().any(|(its, _)| its == node);
        // A node that has no descriptor of its own, such as a job's, may be on any of them.
        let all = !self.nodes.iter().all(|node| known(node));
        let concerned = writable.clone().filter(|(node, _)| all || self.nodes.contains(*node));
        // By way of the process: the file is the one QEMU writes, whatever has become of its name.
        let paths: Vec<_> = concerned.map(|(_, fd)| format!("/proc/{pid}/fd/{fd}")).collect();
        let answer = self.pending_check.get_or_insert_with(|| start_check(paths));
        let Ok(room) = timeout(STATVFS_TIMEOUT, answer).await else { return Ok(false) };
        self.pending_check = None;
        Ok(room == Ok(true))
    }
}

/// Asks the kernel whether there is room on the filesystems of all `paths`, in a thread that nobody has to wait for.
fn start_check(paths: Vec<String>) -> oneshot::Receiver<bool> {
    let (sender, receiver) = oneshot::channel();
    std::thread::spawn(move || {
        let has_room = |path: &String| {
            rustix::fs::statvfs(path.as_str())
                .is_ok_and(|stat| stat.f_bavail.saturating_mul(stat.f_frsize) >= ENOUGH_FREE_BYTES)
        };
        let _ = sender.send(paths.iter().all(has_room));
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
    async fn a_guest_that_fills_the_disk_again_at_once_waits_longer() {
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
    async fn only_a_full_filesystem_is_waited_for() {
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
