//! What one peer may ask of this machine at one time, and how fast (V5): so that a friend at full rate takes nothing from
//! another.
//!
//! `net` bounds streams and connections. Here, behind it, stand reads and signed requests a second, work in the database and
//! at the engine, connections into containers, followed logs, incoming layers, and memory for messages. Whatever is refused
//! here has cost no look at the database.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use peer_net::exchange::Budget;
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};

/// Work of one peer that may be under way in the database or at the engine; the rest waits in its own line.
const WORK: usize = 4;
/// Connections into one owner's containers that may be being made at one time.
const CONNECTS: usize = 16;
/// Logs that one peer may read at one time.
const LOGS: usize = 32;
/// Layers of one peer that may be on their way at one time.
const LAYERS: usize = 16;
/// Memory for messages of one peer, and of all, beyond what every stream may have (bytes).
const FRAMES: usize = 2 << 20;
const FRAMES_OF_ALL: usize = 32 << 20;
/// Shares that are kept before those that nobody uses are cleared away.
const SHARES_KEPT: usize = 2048;

/// How fast one peer may ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rates {
    /// Reads a second, and twice as many at once.
    pub queries_per_second: NonZeroU32,
    /// Signed requests a minute, of which a third may come at once.
    pub requests_per_minute: NonZeroU32,
}

/// The shares of all peers.
#[derive(Debug)]
pub struct Quotas {
    rates: Rates,
    frames: Budget,
    shares: Mutex<HashMap<PeerId, Arc<Share>>>,
}

/// The share of one peer.
#[derive(Debug)]
pub struct Share {
    queries: DefaultDirectRateLimiter,
    requests: DefaultDirectRateLimiter,
    work: Semaphore,
    connects: Semaphore,
    logs: Arc<Semaphore>,
    layers: Arc<Semaphore>,
    /// Memory for its messages.
    pub frames: Budget,
}

impl Quotas {
    /// Bounds every peer by these rates.
    pub fn new(rates: Rates) -> Self {
        Self { rates, frames: Budget::for_all(FRAMES_OF_ALL), shares: Mutex::default() }
    }

    fn shares(&self) -> MutexGuard<'_, HashMap<PeerId, Arc<Share>>> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One peer's share. Only those whom the gate admits are ever asked for; a share that was cleared away began anew.
    pub fn of(&self, peer: PeerId) -> Arc<Share> {
        let mut shares = self.shares();
        if shares.len() >= SHARES_KEPT && !shares.contains_key(&peer) {
            shares.retain(|_, share| Arc::strong_count(share) > 1);
        }
        Arc::clone(shares.entry(peer).or_insert_with(|| Arc::new(Share::new(self.rates, &self.frames))))
    }
}

impl Share {
    fn new(rates: Rates, frames: &Budget) -> Self {
        let Rates { queries_per_second, requests_per_minute } = rates;
        let third = NonZeroU32::new(requests_per_minute.get() / 3).unwrap_or(NonZeroU32::MIN);
        let twice = queries_per_second.saturating_mul(NonZeroU32::new(2).expect("two is not zero"));
        Self {
            queries: RateLimiter::direct(Quota::per_second(queries_per_second).allow_burst(twice)),
            requests: RateLimiter::direct(Quota::per_minute(requests_per_minute).allow_burst(third)),
            work: Semaphore::new(WORK),
            connects: Semaphore::new(CONNECTS),
            logs: Arc::new(Semaphore::new(LOGS)),
            layers: Arc::new(Semaphore::new(LAYERS)),
            frames: frames.share(FRAMES),
        }
    }

    /// Counts one read, or refuses it.
    pub fn query(&self) -> Result<(), Problem> {
        passed(&self.queries, "reads")
    }

    /// Counts one signed request, or refuses it.
    pub fn request(&self) -> Result<(), Problem> {
        passed(&self.requests, "requests")
    }

    /// Waits for the peer's turn among its own work.
    pub async fn work(&self) -> SemaphorePermit<'_> {
        self.work.acquire().await.expect("it is never closed")
    }

    /// Waits for the owner's turn among the connections into its containers.
    pub async fn connect(&self) -> SemaphorePermit<'_> {
        self.connects.acquire().await.expect("it is never closed")
    }

    /// A place for one log that is read.
    pub fn log(&self) -> Result<OwnedSemaphorePermit, Problem> {
        place(&self.logs, LOGS, "logs are read by you here")
    }

    /// A place for one layer that comes.
    pub fn layer(&self) -> Result<OwnedSemaphorePermit, Problem> {
        place(&self.layers, LAYERS, "layers of yours are on their way here")
    }
}

fn passed(limiter: &DefaultDirectRateLimiter, what: &str) -> Result<(), Problem> {
    let later = match limiter.check() {
        Ok(()) => return Ok(()),
        Err(later) => later.wait_time_from(DefaultClock::default().now()),
    };
    // Rounded up, so that whoever waits as long is let in.
    let seconds = later.as_secs().saturating_add(u64::from(later > Duration::from_secs(later.as_secs())));
    let message = format!("you send more {what} than this machine takes from one peer; try again in {seconds} s");
    Err(Problem::new(Code::TooManyRequests, message))
}

fn place(places: &Arc<Semaphore>, most: usize, what: &str) -> Result<OwnedSemaphorePermit, Problem> {
    Arc::clone(places).try_acquire_owned().map_err(|_| {
        let message = format!("{most} {what} already, and no more at one time; try again when one has ended");
        Problem::new(Code::TooManyRequests, message)
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use peer_proto::identity::Identity;

    use super::*;

    fn quotas() -> Quotas {
        let number = |number| NonZeroU32::new(number).unwrap();
        Quotas::new(Rates { queries_per_second: number(5), requests_per_minute: number(30) })
    }

    #[test]
    fn v5_one_peers_flood_leaves_anothers_share_whole() {
        let (quotas, one, other) = (quotas(), Identity::generate().peer_id(), Identity::generate().peer_id());
        let admitted = |peer| (0..1000).filter(|_| quotas.of(peer).query().is_ok()).count();
        assert!((10..20).contains(&admitted(one)), "twice the rate at once");
        assert!((10..20).contains(&admitted(other)));
        let requests = (0..1000).filter(|_| quotas.of(one).request().is_ok()).count();
        assert_eq!(requests, 10, "counted apart from reads");
        let refusal = quotas.of(one).request().unwrap_err();
        assert_eq!(refusal.code, Code::TooManyRequests);
        assert!(refusal.message.contains("try again in 2 s"), "{refusal}");
    }

    #[tokio::test]
    async fn v5_work_of_one_peer_waits_in_its_own_line() {
        let (quotas, one, other) = (quotas(), Identity::generate().peer_id(), Identity::generate().peer_id());
        let (greedy, modest) = (quotas.of(one), quotas.of(other));
        let mut held = Vec::new();
        for _ in 0..WORK {
            held.push(greedy.work().await);
        }
        assert!(tokio::time::timeout(Duration::from_millis(50), greedy.work()).await.is_err());
        drop(modest.work().await);
        held.pop();
        drop(greedy.work().await);
    }

    #[test]
    fn v5_shares_that_nobody_uses_are_cleared_away() {
        let quotas = quotas();
        let kept = Identity::generate().peer_id();
        let share = quotas.of(kept);
        for _ in 0..2 * SHARES_KEPT {
            drop(quotas.of(Identity::generate().peer_id()));
        }
        assert!(quotas.shares().len() <= SHARES_KEPT);
        assert!(Arc::ptr_eq(&share, &quotas.of(kept)), "one that is in use goes on");
    }
}
