//! The clocks that peers have shown in their greetings, for `doctor`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use peer_proto::PeerId;
use peer_proto::unit::Timestamp;

/// Peers that are remembered.
const PEERS_MAX: usize = 256;
/// How long a greeting counts.
const KEPT: Duration = Duration::from_hours(1);

/// What was seen; clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct PeerClocks(Arc<Mutex<HashMap<PeerId, Seen>>>);

#[derive(Debug, Clone, Copy)]
struct Seen {
    /// By how much the peer's clock stood ahead of ours (milliseconds).
    ahead: i64,
    at: Instant,
}

impl PeerClocks {
    /// Remembers what `peer`'s clock showed when ours showed `ours`. The oldest makes place.
    pub(super) fn note(&self, peer: PeerId, theirs: Timestamp, ours: Timestamp) {
        let ahead = i128::from(theirs.0) - i128::from(ours.0);
        let ahead = i64::try_from(ahead).unwrap_or(if ahead > 0 { i64::MAX } else { i64::MIN });
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= PEERS_MAX && !seen.contains_key(&peer) {
            let oldest = seen.iter().min_by_key(|(_, seen)| seen.at).map(|(peer, _)| *peer);
            oldest.map(|oldest| seen.remove(&oldest));
        }
        seen.insert(peer, Seen { ahead, at: Instant::now() });
    }

    /// Peers seen within the last hour, and by how much their clocks stood ahead of ours (milliseconds).
    pub(super) fn lately(&self) -> Vec<(PeerId, i64)> {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.retain(|_, seen| seen.at.elapsed() < KEPT);
        seen.iter().map(|(peer, seen)| (*peer, seen.ahead)).collect()
    }
}

#[cfg(test)]
mod tests {
    use peer_proto::identity::Identity;

    use super::*;

    #[test]
    fn differences_are_remembered_and_bounded() {
        let clocks = PeerClocks::default();
        let peer = Identity::generate().peer_id();
        clocks.note(peer, Timestamp(1_000), Timestamp(4_000));
        assert_eq!(clocks.lately(), [(peer, -3_000)]);
        clocks.note(peer, Timestamp(u64::MAX), Timestamp(0));
        assert_eq!(clocks.lately(), [(peer, i64::MAX)]);
        for _ in 0..PEERS_MAX {
            clocks.note(Identity::generate().peer_id(), Timestamp(1), Timestamp(1));
        }
        let seen = clocks.lately();
        assert_eq!(seen.len(), PEERS_MAX);
        assert!(!seen.iter().any(|(other, _)| *other == peer), "the oldest made place");
    }
}
