//! Wrong passphrases: some are free, then each has a longer pause behind it.

use std::time::{Duration, Instant};

/// Wrong ones in a row before the first pause.
const FREE: u32 = 5;
/// The first pause.
const PAUSE: Duration = Duration::from_secs(5);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_mins(5);

/// Counts wrong passphrases in a row.
#[derive(Debug, Default)]
pub(crate) struct Attempts {
    wrong: u32,
    until: Option<Instant>,
}

impl Attempts {
    /// How long nobody may try at `now`.
    pub(crate) fn pause(&self, now: Instant) -> Option<Duration> {
        self.until.map(|until| until.saturating_duration_since(now)).filter(|left| !left.is_zero())
    }

    /// A wrong one.
    pub(crate) fn failed(&mut self, now: Instant) {
        self.wrong = self.wrong.saturating_add(1);
        if self.wrong >= FREE {
            let pause = PAUSE.saturating_mul(1 << (self.wrong - FREE).min(16)).min(PAUSE_MAX);
            self.until = Some(now + pause);
        }
    }

    /// The right one.
    pub(crate) fn passed(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn g3_guessing_gets_slower_until_the_right_one_comes() {
        let (mut attempts, start) = (Attempts::default(), Instant::now());
        for _ in 1..FREE {
            attempts.failed(start);
            assert_eq!(attempts.pause(start), None);
        }
        attempts.failed(start);
        assert_eq!(attempts.pause(start), Some(PAUSE));
        assert_eq!(attempts.pause(start + PAUSE), None);
        for _ in 0..100 {
            attempts.failed(start);
        }
        assert_eq!(attempts.pause(start), Some(PAUSE_MAX));
        attempts.passed();
        assert_eq!(attempts.pause(start), None);
    }
}
