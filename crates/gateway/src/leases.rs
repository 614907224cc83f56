//! Which names are live, and through whom: a table in memory, filled by providers over their lease streams.
//!
//! A name belongs to the pair (provider, deployment) by derivation, so the table never has to decide between two
//! claims (V8). A lease ends by release, with its stream, or with its provider's admission; whatever still uses it is
//! told through [`Lease::ended`]. Names that ended lately are remembered, in a bounded list, so that a visitor learns
//! whether a deployment was stopped or its machine is away.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use peer_net::PeerId;
use peer_proto::id::{DeploymentId, Label};
use peer_proto::tunnel::LEASES_MAX;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// Names that ended lately and are remembered.
const ENDED_MAX: usize = 4096;

/// One live name.
#[derive(Debug, Clone)]
pub struct Lease {
    /// The name.
    pub label: Label,
    /// Who serves it.
    pub provider: PeerId,
    /// What the provider knows it by.
    pub deployment: DeploymentId,
    /// Differs for each registration, also of one name.
    pub generation: u64,
    /// Visits that this provider may serve at once, over all its leases.
    pub slots: Arc<Semaphore>,
    /// Cancelled the moment the lease ends.
    pub ended: CancellationToken,
}

/// How a name that is not live ended, if we remember it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Its provider released it.
    Released,
    /// Its provider's connection was lost.
    Lost,
}

/// What is known of a name.
#[derive(Debug)]
pub enum Lookup {
    /// Live.
    Live(Lease),
    /// Was live.
    Ended(Ending),
    /// Never heard of, or too long ago.
    Unknown,
}

/// The provider holds as many leases as it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this provider has {0} names at this gateway already, which is the limit; stop a deployment first")]
pub struct TooManyLeases(pub usize);

/// One lease stream of a provider. A newer stream's leases replace an older one's, and the older one's end then
/// leaves them alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Session {
    provider: PeerId,
    number: u64,
}

#[derive(Debug)]
struct Entry {
    lease: Lease,
    session: u64,
}

#[derive(Debug)]
struct Provider {
    leases: usize,
    slots: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct State {
    live: HashMap<Label, Entry>,
    providers: HashMap<PeerId, Provider>,
    ended: HashMap<Label, Ending>,
    ended_order: VecDeque<Label>,
    counter: u64,
}

/// The table.
#[derive(Debug)]
pub struct Leases {
    state: RwLock<State>,
    names_per_provider: usize,
    visits_per_provider: usize,
}

impl Leases {
    /// An empty table.
    pub fn new(names_per_provider: usize, visits_per_provider: usize) -> Self {
        Self {
            state: RwLock::default(),
            names_per_provider: names_per_provider.min(LEASES_MAX),
            visits_per_provider: visits_per_provider.min(Semaphore::MAX_PERMITS),
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a lease stream of `provider`, which the connection has proven.
    pub fn begin(&self, provider: PeerId) -> Session {
        let mut state = self.write();
        state.counter += 1;
        Session { provider, number: state.counter }
    }

    /// Makes the one name that the session's provider can have for this deployment live.
    pub fn register(&self, session: Session, deployment: DeploymentId) -> Result<Label, TooManyLeases> {
        let label = Label::derive(&session.provider, &deployment);
        let mut state = self.write();
        let held = state.providers.get(&session.provider).map_or(0, |provider| provider.leases);
        if held >= self.names_per_provider && !state.live.contains_key(&label) {
            return Err(TooManyLeases(self.names_per_provider));
        }
        state.remove(&label);
        state.forget_ending(&label);
        state.counter += 1;
        let generation = state.counter;
        let provider = state
            .providers
            .entry(session.provider)
            .or_insert_with(|| Provider { leases: 0, slots: Arc::new(Semaphore::new(self.visits_per_provider)) });
        provider.leases += 1;
        let lease = Lease {
            label,
            provider: session.provider,
            deployment,
            generation,
            slots: Arc::clone(&provider.slots),
            ended: CancellationToken::new(),
        };
        state.live.insert(label, Entry { lease, session: session.number });
        Ok(label)
    }

    /// Ends the name that the session's provider has for this deployment; no later visit finds it.
    pub fn release(&self, session: Session, deployment: DeploymentId) {
        let label = Label::derive(&session.provider, &deployment);
        let mut state = self.write();
        if state.remove(&label) {
            state.remember_ending(label, Ending::Released);
        }
    }

    /// Ends all leases that were registered on this stream and not since on a newer one.
    pub fn end(&self, session: Session) {
        self.write().end_where(|entry| entry.session == session.number);
    }

    /// Ends all leases of a provider.
    pub fn end_provider(&self, provider: PeerId) {
        self.write().end_where(|entry| entry.lease.provider == provider);
    }

    /// What is known of a name.
    pub fn find(&self, label: &Label) -> Lookup {
        let state = self.read();
        match (state.live.get(label), state.ended.get(label)) {
            (Some(entry), _) => Lookup::Live(entry.lease.clone()),
            (None, Some(ending)) => Lookup::Ended(*ending),
            (None, None) => Lookup::Unknown,
        }
    }

    /// Providers that hold leases, each with the number of them.
    pub fn providers(&self) -> HashMap<PeerId, usize> {
        self.read().providers.iter().map(|(peer, provider)| (*peer, provider.leases)).collect()
    }

    /// Number of live names.
    pub fn len(&self) -> usize {
        self.read().live.len()
    }

    /// True while no name is live.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl State {
    fn remove(&mut self, label: &Label) -> bool {
        let Some(entry) = self.live.remove(label) else { return false };
        entry.lease.ended.cancel();
        if let Some(provider) = self.providers.get_mut(&entry.lease.provider) {
            provider.leases -= 1;
            if provider.leases == 0 {
                self.providers.remove(&entry.lease.provider);
            }
        }
        true
    }

    fn end_where(&mut self, ends: impl Fn(&Entry) -> bool) {
        let labels: Vec<Label> = self.live.iter().filter(|(_, entry)| ends(entry)).map(|(label, _)| *label).collect();
        for label in labels {
            self.remove(&label);
            self.remember_ending(label, Ending::Lost);
        }
    }

    fn remember_ending(&mut self, label: Label, ending: Ending) {
        if self.ended.insert(label, ending).is_none() {
            self.ended_order.push_back(label);
        }
        if self.ended_order.len() > ENDED_MAX
            && let Some(oldest) = self.ended_order.pop_front()
        {
            self.ended.remove(&oldest);
        }
    }

    fn forget_ending(&mut self, label: &Label) {
        if self.ended.remove(label).is_some() {
            self.ended_order.retain(|other| other != label);
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing registration is a failing test")]
mod tests {
    use super::*;
    use peer_proto::identity::Identity;

    fn peer() -> PeerId {
        Identity::generate().peer_id()
    }

    fn is_live(leases: &Leases, label: &Label) -> bool {
        matches!(leases.find(label), Lookup::Live(_))
    }

    #[test]
    fn v8_no_provider_touches_the_name_of_another() {
        let leases = Leases::new(10, 10);
        let (owner, thief) = (leases.begin(peer()), leases.begin(peer()));
        let deployment = DeploymentId::random();
        let label = leases.register(owner, deployment).unwrap();
        let other = leases.register(thief, deployment).unwrap();
        assert_ne!(label, other);
        leases.release(thief, deployment);
        leases.end(thief);
        assert!(is_live(&leases, &label));
        let Lookup::Live(lease) = leases.find(&label) else { panic!("the name is live") };
        assert_eq!(lease.provider, owner.provider);
    }

    #[test]
    fn v8_release_and_loss_end_a_name_at_once_and_tell_its_users() {
        let leases = Leases::new(10, 10);
        let session = leases.begin(peer());
        let (one, two) = (DeploymentId::random(), DeploymentId::random());
        let (first, second) = (leases.register(session, one).unwrap(), leases.register(session, two).unwrap());
        let Lookup::Live(lease) = leases.find(&first) else { panic!("the name is live") };
        leases.release(session, one);
        assert!(lease.ended.is_cancelled());
        assert!(matches!(leases.find(&first), Lookup::Ended(Ending::Released)));
        leases.end(session);
        assert!(matches!(leases.find(&second), Lookup::Ended(Ending::Lost)));
        assert!(leases.is_empty() && leases.providers().is_empty());
        leases.register(session, one).unwrap();
        assert!(is_live(&leases, &first));
    }

    #[test]
    fn end_of_an_old_stream_spares_what_a_newer_one_registered() {
        let leases = Leases::new(10, 10);
        let provider = peer();
        let (old, deployment) = (leases.begin(provider), DeploymentId::random());
        let label = leases.register(old, deployment).unwrap();
        let Lookup::Live(before) = leases.find(&label) else { panic!("the name is live") };
        let new = leases.begin(provider);
        leases.register(new, deployment).unwrap();
        assert!(before.ended.is_cancelled());
        leases.end(old);
        assert!(is_live(&leases, &label));
        leases.end_provider(provider);
        assert!(!is_live(&leases, &label));
    }

    #[test]
    fn v7_leases_and_memories_are_bounded() {
        let leases = Leases::new(2, 10);
        let session = leases.begin(peer());
        let deployments: Vec<_> = (0..3).map(|_| DeploymentId::random()).collect();
        leases.register(session, deployments[0]).unwrap();
        leases.register(session, deployments[1]).unwrap();
        assert_eq!(leases.register(session, deployments[2]), Err(TooManyLeases(2)));
        assert!(leases.register(session, deployments[1]).is_ok());
        leases.end(session);
        for _ in 0..ENDED_MAX + 10 {
            let deployment = DeploymentId::random();
            leases.register(session, deployment).unwrap();
            leases.release(session, deployment);
        }
        let state = leases.read();
        assert_eq!((state.ended.len(), state.ended_order.len()), (ENDED_MAX, ENDED_MAX));
    }
}
