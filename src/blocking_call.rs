//! Runs a function in a thread of its own, so that a system call that never returns cannot block
//! the caller.
//!
//! A system call on a filesystem whose server does not answer has no timeout and may never return.
//! So another thread makes it. On timeout the caller goes on without that thread, which ends with
//! this short-lived process. The kernel ends a killed process that waits for NFS or FUSE
//! (`TASK_KILLABLE`). It cannot end one that waits for a hung local disk.

use std::sync::mpsc;
use std::time::Instant;

/// Returns the result of `job`, or `None` if `job` is still running at `deadline`. The thread of
/// `job` is then left running, and its result is dropped.
pub fn run_with_timeout<T: Send + 'static>(
    deadline: Instant,
    job: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        // Fails if the caller has timed out.
        let _ = sender.send(job());
    });
    receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn run_with_timeout_of_a_hung_job_returns_none() {
        let (hung, never) = mpsc::channel::<()>();
        let soon = Instant::now() + Duration::from_millis(20);
        assert!(run_with_timeout(soon, move || never.recv()).is_none());
        drop(hung);
        assert_eq!(run_with_timeout(Instant::now() + Duration::from_secs(20), || 7), Some(7));
    }
}
