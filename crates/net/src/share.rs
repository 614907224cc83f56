//! What one peer may take of this machine's network, over all of its connections.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use libp2p::PeerId;
use tokio::sync::Semaphore;

use crate::gate::{Policy, Role};
use crate::options::Limits;

/// How fast one peer may open streams.
pub(crate) type Pace = DefaultDirectRateLimiter;

/// One peer's share.
#[derive(Debug, Clone)]
pub(crate) struct Share {
    role: Role,
    /// Streams that it may have open here.
    pub(crate) slots: Arc<Semaphore>,
    /// How fast it may open them; as fast as it likes, if there is none.
    pub(crate) pace: Option<Arc<Pace>>,
}

impl Share {
    fn new(role: Role, limits: &Limits) -> Self {
        let (streams, pace) = match role {
            Role::Peer => (limits.inbound_streams_per_peer, limits.stream_pace),
            Role::Joiner => (limits.inbound_streams_per_joiner, limits.stream_pace),
            // A visit is a stream: there are as many as visitors.
            Role::Gateway => (limits.inbound_streams_per_gateway, None),
            Role::Provider => (limits.inbound_streams_per_provider, limits.stream_pace),
        };
        let burst = |pace: NonZeroU32| pace.saturating_mul(NonZeroU32::new(2).expect("two is not zero"));
        let limiter = |pace| RateLimiter::direct(Quota::per_second(pace).allow_burst(burst(pace)));
        Self { role, slots: Arc::new(Semaphore::new(streams)), pace: pace.map(|pace| Arc::new(limiter(pace))) }
    }
}

/// The shares of all who are admitted; nobody else has one, so that their number is bounded by the policy.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    shares: Mutex<HashMap<PeerId, Share>>,
}

impl Shares {
    /// The share of an admitted peer. Its connections of one role have it together.
    pub(crate) fn of(&self, peer: PeerId, role: Role, limits: &Limits) -> Share {
        let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        let share = shares.entry(peer).or_insert_with(|| Share::new(role, limits));
        if share.role != role {
            *share = Share::new(role, limits);
        }
        share.clone()
    }

    /// Forgets those who are admitted no more.
    pub(crate) fn keep(&self, policy: &Policy) {
        let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        shares.retain(|peer, share| policy.role(peer) == Some(share.role));
    }
}
