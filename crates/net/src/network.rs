//! The handle that the rest of a program holds: start, open a stream, look, listen for events, shut down.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use libp2p::identity::Keypair;
use libp2p::{Multiaddr, PeerId};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connection::{Connection, ConnectionInfo, ConnectionState, Life, Table, Traffic};
use crate::counters::{Counters, CountersSnapshot};
use crate::driver::{Command, Driver};
use crate::exchange::Deadline;
use crate::gate::Policy;
use crate::handler::{Agreement, OpenRequest, StreamFailure};
use crate::known::Known;
use crate::multiplex::Multiplexing;
use crate::options::Options;
use crate::protocol::{Protocol, Protocols};
use crate::share::Shares;
use crate::streams::{Incoming, Stream};
use crate::swarm;

/// Requests to the driver that may wait for its next turn.
const COMMAND_QUEUE: usize = 256;
/// Events kept for a subscriber that falls behind.
const EVENT_QUEUE: usize = 1024;
/// Longest wait for the tasks of a network that shuts down.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection may take to show whether a failed stream meant its end.
const SETTLING_TIME: Duration = Duration::from_millis(200);

/// Why the network did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The identity key cannot be used for the handshake.
    #[error("the identity key cannot be used for encrypted connections: {0}")]
    Key(String),
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {reason}; choose another address or stop the program that holds it")]
    Listen {
        /// The address.
        address: Multiaddr,
        /// What the system said.
        reason: String,
    },
}

/// Why no stream was opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The policy does not admit the peer.
    #[error("{peer} is not one of our peers; add it first")]
    NotAdmitted {
        /// The peer.
        peer: PeerId,
    },
    /// No connection, and none could be made.
    #[error(
        "{peer} is offline ({reason}; tried {}); check that it runs and that its address is right",
        addresses(tried)
    )]
    Offline {
        /// The peer.
        peer: PeerId,
        /// Addresses that were tried.
        tried: Vec<Multiaddr>,
        /// What the last attempt met.
        reason: String,
    },
    /// The other side ended the connection before it answered anything.
    #[error("{peer} refused the connection: it has not added this machine as a peer, or removed it")]
    RefusedByPeer {
        /// The peer.
        peer: PeerId,
    },
    /// Somebody else answers at the peer's address.
    #[error("{address} belongs to {obtained}, not to {expected}; the connection was refused, check the address")]
    WrongPeer {
        /// The peer that was wanted.
        expected: PeerId,
        /// The peer that answered.
        obtained: PeerId,
        /// Where it answered.
        address: Multiaddr,
    },
    /// The peer is connected and does not offer this protocol to us.
    #[error("{peer} does not let this machine use {protocol}; its version or our permission differs")]
    NotOffered {
        /// The peer.
        peer: PeerId,
        /// The protocol.
        protocol: Protocol,
    },
    /// All streams that may be open at once with the peer stayed in use.
    #[error("{peer} is busy: all {limit} streams stayed in use; try again later")]
    Busy {
        /// The peer.
        peer: PeerId,
        /// Streams that may be open at once.
        limit: usize,
    },
    /// The peer did not answer in time.
    #[error("{peer} did not answer within {} s", waited.as_secs())]
    TimedOut {
        /// The peer.
        peer: PeerId,
        /// Time allowed.
        waited: Duration,
    },
    /// The stream broke while it was being opened.
    #[error("the connection with {peer} broke while a stream was opened: {reason}; try again")]
    Broken {
        /// The peer.
        peer: PeerId,
        /// What happened.
        reason: String,
    },
    /// The network has shut down.
    #[error("the network is shutting down")]
    Stopped,
}

/// The addresses as one text for a message.
fn addresses(tried: &[Multiaddr]) -> String {
    if tried.is_empty() {
        return "no address".to_owned();
    }
    tried.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Something worth telling or auditing. Slow subscribers lose the oldest events, never the network's time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkEvent {
    /// The peer's first connection has been accepted by both sides.
    Connected {
        /// The peer.
        peer: PeerId,
    },
    /// The peer's last connection is over.
    Disconnected {
        /// The peer.
        peer: PeerId,
        /// Why, in words.
        reason: String,
    },
    /// An inbound connection was refused (V1).
    Refused {
        /// Who tried, if the handshake came so far.
        peer: Option<PeerId>,
        /// Where from.
        address: Multiaddr,
        /// Why.
        reason: RefusalReason,
    },
    /// A peer ended our connection before answering anything.
    RefusedByPeer {
        /// The peer.
        peer: PeerId,
        /// Where it was reached.
        address: Multiaddr,
    },
    /// Another key answered at a peer's address (V6); nothing was sent to it.
    WrongPeer {
        /// The peer that was wanted.
        expected: PeerId,
        /// The peer that answered.
        obtained: PeerId,
        /// Where it answered.
        address: Multiaddr,
    },
}

/// Why an inbound connection was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RefusalReason {
    /// The PeerId is not in the policy.
    NotAdmitted,
    /// Too many handshakes were in progress, in total or from the address.
    TooManyHandshakes,
    /// Too many connections are established, in total or with the peer.
    TooManyConnections,
}

/// What the driver, the behaviours and the handles have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) options: Options,
    pub(crate) protocols: Protocols,
    pub(crate) counters: Counters,
    pub(crate) table: Table,
    pub(crate) events: broadcast::Sender<NetworkEvent>,
    pub(crate) shares: Shares,
    pub(crate) known: Known,
    policy: RwLock<Arc<Policy>>,
    /// Why the last dial of each peer failed; only peers that are dialled have an entry.
    failures: RwLock<HashMap<PeerId, OpenError>>,
    listening: RwLock<Vec<Multiaddr>>,
}

impl Shared {
    fn new(options: Options, protocols: Protocols, policy: Arc<Policy>) -> Self {
        Self {
            options,
            protocols,
            counters: Counters::default(),
            table: Table::default(),
            events: broadcast::Sender::new(EVENT_QUEUE),
            shares: Shares::default(),
            known: Known::listed_in(&policy),
            policy: RwLock::new(policy),
            failures: RwLock::default(),
            listening: RwLock::default(),
        }
    }

    pub(crate) fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.policy.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn replace_policy(&self, policy: Arc<Policy>) -> Arc<Policy> {
        self.shares.keep(&policy);
        self.known.follow(&policy);
        std::mem::replace(&mut *self.policy.write().unwrap_or_else(PoisonError::into_inner), policy)
    }

    /// The bounds of a new connection. Whoever is not admitted is refused before he can open a stream.
    pub(crate) fn multiplexing(&self, peer: &PeerId) -> Multiplexing {
        let limits = &self.options.limits;
        let Some(role) = self.policy().role(peer) else { return Multiplexing { streams: 1, waiting: 0, pace: None } };
        let pace = self.shares.of(*peer, role, limits).pace;
        Multiplexing { streams: limits.multiplexed_streams(role), waiting: limits.waiting_streams(role), pace }
    }

    pub(crate) fn record_failure(&self, peer: PeerId, failure: Option<OpenError>) {
        let mut failures = self.failures.write().unwrap_or_else(PoisonError::into_inner);
        match failure {
            Some(failure) => failures.insert(peer, failure),
            None => failures.remove(&peer),
        };
    }

    fn failure(&self, peer: PeerId) -> Option<OpenError> {
        self.failures.read().unwrap_or_else(PoisonError::into_inner).get(&peer).cloned()
    }

    pub(crate) fn edit_listening(&self, edit: impl FnOnce(&mut Vec<Multiaddr>)) {
        edit(&mut self.listening.write().unwrap_or_else(PoisonError::into_inner));
    }

    fn listening(&self) -> Vec<Multiaddr> {
        self.listening.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A subscriber is not needed for the network to work.
    pub(crate) fn publish(&self, event: NetworkEvent) {
        drop(self.events.send(event));
    }

    /// Silence after which a connection is used only when there is no other.
    fn silence_limit(&self) -> Duration {
        self.options.ping_interval * 3
    }
}

/// Ends the driver and all connections when the last handle is dropped.
struct Inner {
    local: PeerId,
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    tasks: TaskTracker,
    stop: CancellationToken,
    kill: CancellationToken,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop.cancel();
        self.kill.cancel();
    }
}

/// A running network; clones are handles to the same one. Dropping the last handle ends it at once.
#[derive(Clone)]
pub struct Network {
    inner: Arc<Inner>,
}

impl fmt::Debug for Network {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Network").field("local", &self.inner.local).finish_non_exhaustive()
    }
}

impl Network {
    /// Binds the listeners and starts the driver. `protocols` says which protocols each role may open here. The policy
    /// is followed as it changes: a peer that leaves it, or changes its role, loses its connections at once.
    pub async fn start(
        keypair: Keypair,
        options: Options,
        mut policy: watch::Receiver<Arc<Policy>>,
        protocols: Protocols,
    ) -> Result<(Self, Incoming), StartError> {
        let (incoming_sender, incoming) = mpsc::channel(options.limits.incoming_queue);
        let (commands, command_queue) = mpsc::channel(COMMAND_QUEUE);
        let (tasks, stop, kill) = (TaskTracker::new(), CancellationToken::new(), CancellationToken::new());
        let shared = Arc::new(Shared::new(options, protocols, policy.borrow_and_update().clone()));
        let swarm = swarm::build(&keypair, &shared, incoming_sender, &tasks, &kill)
            .map_err(|error| StartError::Key(error.to_string()))?;
        let mut driver = Driver::new(swarm, Arc::clone(&shared), policy, command_queue, stop.clone());
        driver.listen().await?;
        tasks.spawn(kill.clone().run_until_cancelled_owned(driver.run()));
        let local = keypair.public().to_peer_id();
        Ok((Self { inner: Arc::new(Inner { local, shared, commands, tasks, stop, kill }) }, Incoming::new(incoming)))
    }

    /// Our own PeerId.
    pub fn local_peer_id(&self) -> PeerId {
        self.inner.local
    }

    /// The addresses that are bound, with the real ports.
    pub fn listen_addresses(&self) -> Vec<Multiaddr> {
        self.inner.shared.listening()
    }

    /// Opens a stream on the peer's connection for this kind of traffic, or on any other one; dials first if there is
    /// none and addresses are known. Success means that the peer has agreed to the protocol.
    pub async fn open(&self, peer: PeerId, protocol: Protocol, traffic: Traffic) -> Result<Stream, OpenError> {
        self.open_when(peer, protocol, traffic, Agreement::Awaited).await
    }

    /// As [`Network::open`], one round trip earlier: the peer's agreement to the protocol is not awaited. A peer that
    /// does not agree makes the first read fail with [`std::io::ErrorKind::PermissionDenied`]. Nothing reaches the peer
    /// before the first flush or read.
    pub async fn open_early(&self, peer: PeerId, protocol: Protocol, traffic: Traffic) -> Result<Stream, OpenError> {
        self.open_when(peer, protocol, traffic, Agreement::Early).await
    }

    async fn open_when(
        &self,
        peer: PeerId,
        protocol: Protocol,
        traffic: Traffic,
        agreement: Agreement,
    ) -> Result<Stream, OpenError> {
        let waited = self.inner.shared.options.open_timeout;
        let deadline = Deadline::after(waited);
        let attempts = async {
            loop {
                let connection = self.connection(peer, traffic).await?;
                // Until the peer has answered something, only its agreement shows that it has not refused us.
                let agreement = if connection.is_accepted() { agreement } else { Agreement::Awaited };
                if let Some(stream) = self.open_on(&connection, protocol, agreement, deadline).await? {
                    return Ok(stream);
                }
            }
        };
        deadline.bound(attempts).await.unwrap_or(Err(OpenError::TimedOut { peer, waited }))
    }

    /// How we stand with a peer.
    pub fn connection_state(&self, peer: PeerId) -> ConnectionState {
        let shared = &self.inner.shared;
        if shared.policy().role(&peer).is_none() {
            return ConnectionState::NotAdmitted;
        }
        let connections: Vec<_> =
            shared.table.of_peer(peer).iter().filter(|connection| connection.is_accepted()).map(|c| c.info()).collect();
        if connections.is_empty() {
            return ConnectionState::Offline { last_error: shared.failure(peer).map(|failure| failure.to_string()) };
        }
        ConnectionState::Connected(connections)
    }

    /// All live connections that both sides have accepted.
    pub fn connections(&self) -> Vec<ConnectionInfo> {
        let connections = self.inner.shared.table.all();
        connections.iter().filter(|connection| connection.is_accepted()).map(|c| c.info()).collect()
    }

    /// Events from now on.
    pub fn events(&self) -> broadcast::Receiver<NetworkEvent> {
        self.inner.shared.events.subscribe()
    }

    /// All counters at this moment.
    pub fn counters(&self) -> CountersSnapshot {
        self.inner.shared.counters.snapshot()
    }

    /// Peers that the network holds connections of: the number of entries it tracks.
    pub fn tracked_peers(&self) -> usize {
        self.inner.shared.table.peers()
    }

    /// Closes all connections and waits for the driver's end. Other handles fail with [`OpenError::Stopped`].
    pub async fn shutdown(self) {
        let inner = &self.inner;
        inner.stop.cancel();
        inner.tasks.close();
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, inner.tasks.wait()).await.is_err() {
            inner.kill.cancel();
            inner.tasks.wait().await;
        }
    }

    /// The connection to use, made if need be.
    async fn connection(&self, peer: PeerId, traffic: Traffic) -> Result<Arc<Connection>, OpenError> {
        let shared = &self.inner.shared;
        let mut dialled = false;
        loop {
            if self.inner.stop.is_cancelled() {
                return Err(OpenError::Stopped);
            }
            if shared.policy().role(&peer).is_none() {
                return Err(OpenError::NotAdmitted { peer });
            }
            if let Some(connection) = shared.table.choose(peer, traffic, shared.silence_limit()) {
                return Ok(connection);
            }
            // A connection that was made and is gone again before we looked has left its reason.
            if dialled && let Some(failure) = shared.failure(peer) {
                return Err(failure);
            }
            dialled = true;
            let (reply, answer) = oneshot::channel();
            self.inner.commands.send(Command::Connect { peer, reply }).await.map_err(|_| OpenError::Stopped)?;
            answer.await.map_err(|_| OpenError::Stopped)??;
        }
    }

    /// A stream on this connection; `None` if the connection turned out to be over, after having been a good one.
    async fn open_on(
        &self,
        connection: &Connection,
        protocol: Protocol,
        agreement: Agreement,
        deadline: Deadline,
    ) -> Result<Option<Stream>, OpenError> {
        let peer = connection.peer;
        let acquired = deadline.bound(Arc::clone(&connection.outbound_slots).acquire_owned()).await;
        let limit = self.inner.shared.options.limits.outbound_streams(connection.role);
        let failure = match acquired.ok_or(OpenError::Busy { peer, limit })? {
            Ok(slot) => {
                let (reply, answer) = oneshot::channel();
                // If the handler is gone, the request is dropped with its reply, which the answer then tells.
                drop(connection.requests.send(OpenRequest { protocol, agreement, slot, reply }).await);
                match answer.await {
                    Ok(Ok(stream)) => return Ok(Some(stream)),
                    Ok(Err(failure)) => Some(failure),
                    Err(_) => None,
                }
            }
            Err(_closed) => None,
        };
        // A stream also fails when its whole connection ends, and the news of that may come a moment later.
        let life = self.settle(connection).await;
        match (life, failure) {
            (Life::Refused, _) => Err(OpenError::RefusedByPeer { peer }),
            (Life::Closed, _) => Ok(None),
            (_, Some(StreamFailure::NotOffered)) => Err(OpenError::NotOffered { peer, protocol }),
            (_, Some(StreamFailure::TimedOut)) => {
                Err(OpenError::TimedOut { peer, waited: self.inner.shared.options.open_timeout })
            }
            (_, Some(StreamFailure::Broken(reason))) => Err(OpenError::Broken { peer, reason }),
            (_, None) => Err(OpenError::Broken { peer, reason: "the connection is closing".to_owned() }),
        }
    }

    /// Waits until it is plain whether the connection is over: for its end, or (while the peer has proven nothing yet)
    /// for its proof, and at most for a moment.
    async fn settle(&self, connection: &Connection) -> Life {
        let mut life = connection.life();
        let ended = |life: &Life| matches!(life, Life::Closed | Life::Refused);
        if *life.borrow() == Life::Unproven {
            let limit = self.inner.shared.options.ping_timeout;
            drop(tokio::time::timeout(limit, life.wait_for(|life| *life != Life::Unproven)).await);
        }
        drop(tokio::time::timeout(SETTLING_TIME, life.wait_for(ended)).await);
        life.borrow().to_owned()
    }
}
