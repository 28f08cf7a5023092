//! Whether and when a crashed VM is started again.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// At most this many restarts …
const LIMIT: usize = 3;
/// … within this time.
const WINDOW: Duration = Duration::from_secs(600);
/// How long to wait before the first, second and third restart of a window.
const BACK_OFF: [Duration; LIMIT] =
    [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(15)];

/// The restarts of the last ten minutes.
#[derive(Debug, Default)]
pub(super) struct Restarts(VecDeque<Instant>);

impl Restarts {
    /// How long to wait before the next restart, or `None` if there were too many. Counts it.
    pub(super) fn next(&mut self, now: Instant) -> Option<Duration> {
        while self.0.front().is_some_and(|at| now.duration_since(*at) > WINDOW) {
            self.0.pop_front();
        }
        let wait = BACK_OFF.get(self.0.len()).copied()?;
        self.0.push_back(now);
        Some(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_in_ten_minutes_and_then_again() {
        let (mut restarts, start) = (Restarts::default(), Instant::now());
        let waits: Vec<_> = (0..4).map(|_| restarts.next(start)).collect();
        assert_eq!(waits, [Some(BACK_OFF[0]), Some(BACK_OFF[1]), Some(BACK_OFF[2]), None]);
        assert_eq!(restarts.next(start + WINDOW), None);
        assert_eq!(restarts.next(start + WINDOW + Duration::from_secs(1)), Some(BACK_OFF[0]));
    }
}
