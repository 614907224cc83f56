//! Dialling: which connection is missing, when to try, and what a failure means. Part of the [`Driver`].

use std::collections::HashSet;
use std::time::Duration;

use libp2p::multiaddr::Protocol as Component;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError};
use libp2p::{Multiaddr, PeerId};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::connection::{Direction, Traffic};
use crate::counters::count;
use crate::driver::Driver;
use crate::gate::NotAdmitted;
use crate::network::{NetworkEvent, OpenError};
use crate::options::Options;
use crate::resolve::{has_name, resolve};

/// What is under way for one peer; at most one thing at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Attempt {
    /// The peer's host names are being looked up.
    Resolving,
    /// The peer is being dialled.
    Dialling(ConnectionId),
}

/// Host names looked up for one attempt.
#[derive(Debug)]
pub(crate) struct Lookup {
    peer: PeerId,
    traffic: Traffic,
    addresses: Vec<Multiaddr>,
    unknown: Vec<String>,
}

/// The dialling of one peer that has addresses.
#[derive(Debug, Default)]
pub(crate) struct Dialer {
    pub(crate) attempt: Option<Attempt>,
    /// Failures in a row.
    pub(crate) failures: u32,
    /// When to look again whether a connection is missing; `None` while nothing is.
    pub(crate) next: Option<Instant>,
    /// Addresses of the current attempt, names resolved.
    tried: Vec<Multiaddr>,
    /// Addresses where another key answered in this round.
    pub(crate) wrong: HashSet<Multiaddr>,
    pub(crate) waiting: Vec<oneshot::Sender<Result<(), OpenError>>>,
}

impl Dialer {
    pub(crate) fn due() -> Self {
        Self { next: Some(Instant::now()), ..Self::default() }
    }

    /// The time of the next attempt, unless one is under way.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.next.filter(|_| self.attempt.is_none())
    }

    /// Notes that the dial with this id is over.
    pub(crate) fn finish(&mut self, id: ConnectionId) {
        self.attempt.take_if(|attempt| *attempt == Attempt::Dialling(id));
    }

    pub(crate) fn answer(&mut self, outcome: &Result<(), OpenError>) {
        for waiter in self.waiting.drain(..) {
            // Somebody who no longer waits does not need the answer.
            drop(waiter.send(outcome.clone()));
        }
    }
}

impl Driver {
    pub(crate) fn dial_due(&mut self) {
        let now = Instant::now();
        let due = |dialer: &Dialer| dialer.next().is_some_and(|next| next <= now);
        let due: Vec<_> = self.dialers.iter().filter(|(_, dialer)| due(dialer)).map(|(peer, _)| *peer).collect();
        for peer in due {
            if let Some(traffic) = self.missing(peer) {
                self.begin(peer, traffic);
            } else if let Some(dialer) = self.dialers.get_mut(&peer) {
                dialer.next = None;
            }
        }
    }

    /// The connection to make next. Whoever made the first connection also makes the bulk one; if both sides made one
    /// at the same time, the side with the smaller PeerId does.
    fn missing(&self, peer: PeerId) -> Option<Traffic> {
        let connections = self.shared.table.of_peer(peer);
        if connections.is_empty() {
            return Some(Traffic::Control);
        }
        let outbound = connections.iter().any(|connection| connection.direction == Direction::Outbound);
        let inbound = connections.iter().any(|connection| connection.direction == Direction::Inbound);
        if inbound && !(outbound && *self.swarm.local_peer_id() < peer) {
            return None;
        }
        let have = |traffic| connections.iter().any(|connection| connection.traffic() == traffic);
        if !have(Traffic::Control) {
            return Some(Traffic::Control);
        }
        let proven = connections.iter().any(|connection| connection.is_accepted());
        (self.shared.options.bulk_connection && proven && !have(Traffic::Bulk)).then_some(Traffic::Bulk)
    }

    fn begin(&mut self, peer: PeerId, traffic: Traffic) {
        let policy = self.shared.policy();
        let (Some(admission), Some(dialer)) = (policy.admitted.get(&peer), self.dialers.get_mut(&peer)) else { return };
        dialer.next = None;
        let addresses = admission.addresses.clone();
        if !addresses.iter().any(has_name) {
            return self.dial(peer, traffic, addresses);
        }
        dialer.attempt = Some(Attempt::Resolving);
        self.lookups.spawn(async move {
            let (addresses, unknown) = resolve(addresses).await;
            Lookup { peer, traffic, addresses, unknown }
        });
    }

    pub(crate) fn resolved(&mut self, lookup: Lookup) {
        let Lookup { peer, traffic, addresses, unknown } = lookup;
        let Some(dialer) = self.dialers.get_mut(&peer) else { return };
        // The peer may have been removed and added again meanwhile; its new state decides.
        if dialer.attempt.take_if(|attempt| *attempt == Attempt::Resolving).is_none() {
            return;
        }
        if addresses.is_empty() {
            let reason = format!("no address is known for {}", unknown.join(", "));
            return self.retry_later(peer, OpenError::Offline { peer, tried: Vec::new(), reason });
        }
        self.dial(peer, traffic, addresses);
    }

    fn dial(&mut self, peer: PeerId, traffic: Traffic, mut addresses: Vec<Multiaddr>) {
        let Some(dialer) = self.dialers.get_mut(&peer) else { return };
        addresses.retain(|address| !dialer.wrong.contains(&without_peer(address.clone())));
        dialer.tried.clone_from(&addresses);
        // A port of its own for each connection: two from the listening port to one peer would be the same connection.
        let options =
            DialOpts::peer_id(peer).condition(PeerCondition::Always).addresses(addresses).allocate_new_port().build();
        let id = options.connection_id();
        dialer.attempt = Some(Attempt::Dialling(id));
        if traffic == Traffic::Bulk {
            self.swarm.behaviour_mut().streams.expect_bulk(id);
        }
        if let Err(error) = self.swarm.dial(options) {
            self.dial_failed(peer, id, error);
        }
    }

    pub(crate) fn dial_failed(&mut self, peer: PeerId, id: ConnectionId, error: DialError) {
        count(&self.shared.counters.dials_failed);
        let Some(dialer) = self.dialers.get_mut(&peer) else { return };
        dialer.finish(id);
        let failure = match error {
            DialError::WrongPeerId { obtained, address } => {
                count(&self.shared.counters.dials_wrong_peer);
                let address = without_peer(address);
                let event = NetworkEvent::WrongPeer { expected: peer, obtained, address: address.clone() };
                self.shared.publish(event);
                dialer.wrong.insert(address.clone());
                let left = |address: &Multiaddr| !dialer.wrong.contains(&without_peer(address.clone()));
                if dialer.tried.iter().any(left) {
                    dialer.next = Some(Instant::now());
                    return;
                }
                OpenError::WrongPeer { expected: peer, obtained, address }
            }
            DialError::Denied { cause } if cause.downcast_ref::<NotAdmitted>().is_some() => {
                OpenError::NotAdmitted { peer }
            }
            error => OpenError::Offline { peer, tried: dialer.tried.clone(), reason: dial_reason(&error) },
        };
        self.retry_later(peer, failure);
    }

    /// Answers those who wait, and sets the time of the next attempt.
    pub(crate) fn retry_later(&mut self, peer: PeerId, failure: OpenError) {
        let Some(dialer) = self.dialers.get_mut(&peer) else { return };
        dialer.wrong.clear();
        dialer.next = Some(Instant::now() + back_off(&self.shared.options, dialer.failures));
        dialer.failures = dialer.failures.saturating_add(1);
        dialer.answer(&Err(failure.clone()));
        tracing::debug!(%peer, %failure, "dial failed");
        self.shared.record_failure(peer, Some(failure));
    }
}

/// The address as the policy has it: the swarm adds the PeerId that it dials.
fn without_peer(mut address: Multiaddr) -> Multiaddr {
    if matches!(address.iter().last(), Some(Component::P2p(_))) {
        address.pop();
    }
    address
}

/// The words of the innermost cause.
pub(crate) fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// Why a dial failed, with the words that the system used for each address.
fn dial_reason(error: &DialError) -> String {
    match error {
        DialError::Transport(errors) => {
            let mut reasons: Vec<_> = errors.iter().map(|(_, error)| innermost(error)).collect();
            reasons.sort();
            reasons.dedup();
            reasons.join(", ")
        }
        error => innermost(error),
    }
}

/// The pause before the next attempt: doubled with each failure up to the limit, and between half and all of that, so
/// that peers which lost each other at one moment do not come back at one moment.
pub fn back_off(options: &Options, failures: u32) -> Duration {
    let doubled = options.backoff_initial.saturating_mul(1_u32.checked_shl(failures.min(31)).unwrap_or(u32::MAX));
    let longest = doubled.min(options.backoff_limit);
    // Without randomness from the system the pause is simply the longest.
    let random = getrandom::u32().unwrap_or(u32::MAX);
    longest / 2 + (longest / 2).mul_f64(f64::from(random) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_off_doubles_up_to_its_limit_and_is_jittered_below_it() {
        let options = Options::default();
        for (failures, seconds) in [(0, 1), (1, 2), (5, 32), (6, 60), (31, 60), (u32::MAX, 60)] {
            let longest = Duration::from_secs(seconds);
            for _ in 0..100 {
                let pause = back_off(&options, failures);
                assert!(pause >= longest / 2 && pause <= longest, "{failures} failures: {pause:?}");
            }
        }
    }
}
