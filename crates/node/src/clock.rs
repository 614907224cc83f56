//! The wall clock, read in one place, and a clock for what must not be hastened by setting it.

use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use peer_proto::unit::Timestamp;

/// Milliseconds since 1970 by the wall clock.
pub fn now() -> Timestamp {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
}

/// The earlier of the wall clock and of what it would be if nobody had set it since the program began (SECURITY M4): what
/// is cleared away by its age is old by both clocks.
pub fn steady() -> Timestamp {
    static BEGINNING: OnceLock<(Timestamp, Instant)> = OnceLock::new();
    let (wall, begun) = *BEGINNING.get_or_init(|| (now(), Instant::now()));
    steadied(now(), wall, begun.elapsed())
}

fn steadied(now: Timestamp, began_at: Timestamp, elapsed: Duration) -> Timestamp {
    now.min(began_at.plus(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v3_a_clock_that_jumps_ages_nothing() {
        let (began, hour) = (Timestamp(1_800_000_000_000), Duration::from_hours(1));
        assert_eq!(steadied(began.plus(3_600_000), began, hour), began.plus(3_600_000));
        assert_eq!(steadied(began.plus(999_000_000), began, hour), began.plus(3_600_000), "ahead");
        assert_eq!(steadied(Timestamp(5), began, hour), Timestamp(5), "back");
    }
}
