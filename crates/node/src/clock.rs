//! The wall clock, read in one place.

use std::time::{SystemTime, UNIX_EPOCH};

use peer_proto::unit::Timestamp;

/// Milliseconds since 1970 by the wall clock.
pub fn now() -> Timestamp {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
}
