//! The progress of a long copy, on the log.

use std::time::{Duration, Instant};

/// How often the progress of a copy is logged.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Logs how many percent of `what` are done, from time to time.
pub(super) fn log(what: String) -> impl FnMut(u64, u64) {
    every(LOG_INTERVAL, move |percent| tracing::info!(percent, "{what}"))
}

/// Calls `report` with the percentage that is done, at most once in `interval`.
fn every(interval: Duration, mut report: impl FnMut(u64)) -> impl FnMut(u64, u64) {
    let mut reported = Instant::now();
    move |done, of| {
        if reported.elapsed() >= interval {
            reported = Instant::now();
            report(done.saturating_mul(100).checked_div(of).unwrap_or(0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_reported_once_an_interval() {
        let reports = |interval: Duration| {
            let mut reports = Vec::new();
            let mut progress = every(interval, |percent| reports.push(percent));
            for (done, of) in [(0, 200), (50, 200), (200, 200), (0, 0), (u64::MAX, u64::MAX)] {
                progress(done, of);
            }
            drop(progress);
            reports
        };
        assert_eq!(reports(Duration::ZERO), [0, 25, 100, 0, 1]);
        assert!(reports(Duration::from_secs(3600)).is_empty());
    }
}
