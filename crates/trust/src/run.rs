//! One run of the daemon as requests see it: its random number (SECURITY M3), and how long it has lasted by a clock that
//! nobody can set (M4).

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use peer_proto::id::Incarnation;
use peer_proto::unit::Timestamp;
use peer_state::database::{DatabaseError, Tx};

use crate::floor;

/// What the daemon knows at the moment of a decision.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// The wall clock.
    pub now: Timestamp,
    /// Our present run.
    pub incarnation: Incarnation,
    /// Time since that run began, by the monotonic clock.
    pub elapsed: Duration,
}

/// The present run. It has a new number after each start, and whenever the wall clock was accepted anew: a request that was
/// made before is dead after, whatever is remembered of it.
#[derive(Debug)]
pub struct Run {
    present: Mutex<(Incarnation, Instant)>,
}

impl Run {
    /// Begins a run.
    pub fn begin() -> Self {
        Self { present: Mutex::new((Incarnation::random(), Instant::now())) }
    }

    fn present(&self) -> MutexGuard<'_, (Incarnation, Instant)> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number that requests must name.
    pub fn incarnation(&self) -> Incarnation {
        self.present().0
    }

    /// The moment of a decision. Taken inside the transaction that decides: transactions follow one another, so that none
    /// decides by a run that has ended.
    pub fn moment(&self, _tx: &Tx<'_>, now: Timestamp) -> Moment {
        let (incarnation, begun) = *self.present();
        Moment { now, incarnation, elapsed: begun.elapsed() }
    }

    /// Takes the wall clock for right although it went back, and gives the latest time that had been seen. A new run begins:
    /// whatever the later time has let us forget is not accepted again.
    pub fn accept_clock(&self, tx: &Tx<'_>, now: Timestamp) -> Result<Timestamp, DatabaseError> {
        *self.present() = (Incarnation::random(), Instant::now());
        floor::accept(tx, now)
    }
}
