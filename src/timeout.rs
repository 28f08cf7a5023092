//! Waiting no longer than one is willing to for what may never come back.
//!
//! A system call on a filesystem whose server is gone does not return and knows no timeout. So another thread makes it, and
//! is left behind if it takes too long: it ends with this short-lived process. NFS and FUSE let a killed process go
//! (`TASK_KILLABLE`); a local disk that hangs in the kernel does not, and nobody can do anything about that.

use std::sync::mpsc;
use std::time::Instant;

/// What `job` returns, or `None` if it has not by `deadline`; it then goes on in vain.
pub fn run_with_timeout<T: Send + 'static>(
    deadline: Instant,
    job: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        // Nobody may listen any more.
        let _ = sender.send(job());
    });
    receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_hangs_is_left_behind() {
        let (hung, never) = mpsc::channel::<()>();
        let soon = Instant::now() + Duration::from_millis(20);
        assert!(run_with_timeout(soon, move || never.recv()).is_none());
        drop(hung);
        assert_eq!(run_with_timeout(Instant::now() + Duration::from_secs(20), || 7), Some(7));
    }
}
