//! The restart policy: whether and when a crashed VM is started again.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The most restarts within [`COUNTING_INTERVAL`].
const MAX_RESTARTS: usize = 3;
/// How long a restart counts.
const COUNTING_INTERVAL: Duration = Duration::from_secs(600);
/// How long to wait before the first, second and third restart within [`COUNTING_INTERVAL`].
const RESTART_DELAYS: [Duration; MAX_RESTARTS] =
    [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(15)];

/// The times of the restarts in the last ten minutes.
#[derive(Debug, Default)]
pub(super) struct RestartHistory(VecDeque<Instant>);

impl RestartHistory {
    /// Counts a restart and returns how long to wait before it; `None` if there were too many.
    pub(super) fn next_delay(&mut self, now: Instant) -> Option<Duration> {
        while self.0.front().is_some_and(|at| now.duration_since(*at) > COUNTING_INTERVAL) {
            self.0.pop_front();
        }
        let wait = RESTART_DELAYS.get(self.0.len()).copied()?;
        self.0.push_back(now);
        Some(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_delay_allows_three_restarts_in_ten_minutes() {
        let (mut restarts, start) = (RestartHistory::default(), Instant::now());
        let waits: Vec<_> = (0..4).map(|_| restarts.next_delay(start)).collect();
        assert_eq!(
            waits,
            [Some(RESTART_DELAYS[0]), Some(RESTART_DELAYS[1]), Some(RESTART_DELAYS[2]), None]
        );
        assert_eq!(restarts.next_delay(start + COUNTING_INTERVAL), None);
        assert_eq!(
            restarts.next_delay(start + COUNTING_INTERVAL + Duration::from_secs(1)),
            Some(RESTART_DELAYS[0])
        );
    }
}
