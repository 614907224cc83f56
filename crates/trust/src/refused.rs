//! Refused requests of peers in the audit log: the first of a peer and reason at once, then one line a minute with a count.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use libp2p_identity::PeerId;
use peer_proto::code::{Code, Threat};
use peer_proto::unit::Timestamp;
use peer_state::audit::{Entry, Outcome};

use crate::tally::{Line, Tally};

/// Peers and reasons that are told apart at one time.
const REASONS_MAX: usize = 4096;

/// Who was refused, and why.
type Reason = Option<(PeerId, Code, Threat)>;

/// Counts refusals by peer and reason.
#[derive(Debug)]
pub struct Refused {
    tally: Mutex<Tally<Reason>>,
}

impl Default for Refused {
    fn default() -> Self {
        Self { tally: Mutex::new(Tally::new(REASONS_MAX, None)) }
    }
}

impl Refused {
    fn tally(&self) -> MutexGuard<'_, Tally<Reason>> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a refusal gets a line of its own, which the caller writes; it is counted otherwise. `detail` is shown with
    /// the count, if it is the latest.
    pub fn is_first(&self, peer: PeerId, code: Code, threat: Threat, detail: &str) -> bool {
        self.tally().note(Some((peer, code, threat)), 1, detail.to_owned(), Instant::now()).is_some()
    }

    /// Whether the latest refusal of a kind was the one with a line of its own.
    pub fn was_first(&self, peer: PeerId, code: Code, threat: Threat) -> bool {
        self.tally().waiting(&Some((peer, code, threat))) == Some(0)
    }

    /// Takes back what the lines of a peer were not written for.
    pub fn forget(&self, peer: PeerId) {
        self.tally().forget(|reason| reason.is_some_and(|(known, ..)| known == peer));
    }

    /// The lines to write now.
    pub fn due(&self, now: Timestamp) -> Vec<Entry> {
        self.tally().due(Instant::now()).into_iter().map(|line| entry(line, now)).collect()
    }

    /// All that has not been told, for the end of the program.
    pub fn rest(&self, now: Timestamp) -> Vec<Entry> {
        self.tally().rest().into_iter().map(|line| entry(line, now)).collect()
    }
}

fn entry(line: Line<Reason>, at: Timestamp) -> Entry {
    let Line { kind, count, detail } = line;
    let (actor, code, threat) = match kind {
        Some((peer, code, threat)) => (peer.to_string(), code.as_str(), threat),
        None => ("other peers".to_owned(), "several reasons", Threat::V5),
    };
    let detail = format!("{count} more refused since the last such line ({code}); the latest: {detail}");
    Entry { at, actor, action: "requests".to_owned(), outcome: Outcome::Refused(threat), detail }
}
