//! Waiting for progress rather than for an end: a moment that each byte moves forward.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// When something last moved; clones share the moment.
#[derive(Debug, Clone)]
pub struct IdleClock {
    origin: Instant,
    /// Milliseconds after `origin`.
    last: Arc<AtomicU64>,
}

impl Default for IdleClock {
    fn default() -> Self {
        Self { origin: Instant::now(), last: Arc::default() }
    }
}

impl IdleClock {
    /// Something moved just now.
    pub fn touch(&self) {
        let elapsed = u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.fetch_max(elapsed, Ordering::Relaxed);
    }

    /// The moment at which nothing will have moved for `limit`, as things stand.
    pub fn deadline(&self, limit: Duration) -> Instant {
        self.origin + Duration::from_millis(self.last.load(Ordering::Relaxed)) + limit
    }

    /// Returns once nothing has moved for `limit`.
    pub async fn expired(&self, limit: Duration) {
        loop {
            let deadline = self.deadline(limit);
            if deadline <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(deadline).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_touch_moves_the_deadline() {
        let clock = IdleClock::default();
        let limit = Duration::from_mins(1);
        let before = clock.deadline(limit);
        clock.clone().expired(Duration::from_millis(20)).await;
        assert_eq!(clock.deadline(limit), before);
        clock.touch();
        assert!(clock.deadline(limit) > before);
    }
}
