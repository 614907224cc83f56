//! The live connections: one record each, shared by the driver, the connection's handler and those who open streams.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use libp2p::swarm::ConnectionId;
use libp2p::{Multiaddr, PeerId};
use tokio::sync::{Semaphore, mpsc, watch};

use crate::gate::Role;
use crate::handler::OpenRequest;

/// Which of a peer's two connections a stream belongs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Traffic {
    /// Small messages that must not wait behind large ones.
    Control,
    /// Anything that may fill the link.
    Bulk,
}

/// Which side made the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The peer dialled us.
    Inbound,
    /// We dialled the peer.
    Outbound,
}

/// One live connection, as shown to people and to metrics.
#[derive(Debug, Clone)]
pub struct ConnectionInfo {
    /// The peer at the other end, proven by the handshake.
    pub peer: PeerId,
    /// What the peer may do here.
    pub role: Role,
    /// What the connection is for.
    pub traffic: Traffic,
    /// Which side made it.
    pub direction: Direction,
    /// Address of the other end.
    pub address: Multiaddr,
    /// When it was established.
    pub since: Instant,
    /// Round-trip time of the last liveness check.
    pub round_trip: Option<Duration>,
}

/// How we stand with one peer.
#[derive(Debug, Clone)]
pub enum ConnectionState {
    /// The policy does not admit this peer.
    NotAdmitted,
    /// At least one connection is live and has answered.
    Connected(Vec<ConnectionInfo>),
    /// No connection; `last_error` says why the last dial failed, when there was one.
    Offline {
        /// Why the last dial failed.
        last_error: Option<String>,
    },
}

/// Life of a connection. On the dialling side "established" is not yet "accepted": the other side may still refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    /// Established by us; the other side has not answered anything yet.
    Unproven,
    /// The other side has admitted us.
    Accepted,
    /// Over, after it had been accepted.
    Closed,
    /// Over before the other side answered anything.
    Refused,
}

/// Who ended a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EndedBy {
    Us,
    Remote,
}

#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) id: ConnectionId,
    pub(crate) peer: PeerId,
    pub(crate) role: Role,
    pub(crate) direction: Direction,
    pub(crate) address: Multiaddr,
    pub(crate) since: Instant,
    pub(crate) requests: mpsc::Sender<OpenRequest>,
    pub(crate) outbound_slots: Arc<Semaphore>,
    /// The peer's own, over all of its connections.
    pub(crate) inbound_slots: Arc<Semaphore>,
    bulk: AtomicBool,
    life: watch::Sender<Life>,
    /// Last round-trip time (microseconds), plus one so that zero means "none yet".
    round_trip: AtomicU64,
    /// When the peer was last heard (milliseconds after `since`).
    heard: AtomicU64,
}

/// What is known of a connection at the moment it is established.
pub(crate) struct Established {
    pub(crate) id: ConnectionId,
    pub(crate) peer: PeerId,
    pub(crate) role: Role,
    pub(crate) direction: Direction,
    pub(crate) address: Multiaddr,
    pub(crate) traffic: Traffic,
    pub(crate) outbound_streams: usize,
    pub(crate) inbound_slots: Arc<Semaphore>,
}

impl Connection {
    pub(crate) fn new(established: Established, requests: mpsc::Sender<OpenRequest>) -> Self {
        let life = match established.direction {
            Direction::Inbound => Life::Accepted,
            Direction::Outbound => Life::Unproven,
        };
        Self {
            id: established.id,
            peer: established.peer,
            role: established.role,
            direction: established.direction,
            address: established.address,
            since: Instant::now(),
            requests,
            outbound_slots: Arc::new(Semaphore::new(established.outbound_streams)),
            inbound_slots: established.inbound_slots,
            bulk: AtomicBool::new(established.traffic == Traffic::Bulk),
            life: watch::Sender::new(life),
            round_trip: AtomicU64::new(0),
            heard: AtomicU64::new(0),
        }
    }

    pub(crate) fn traffic(&self) -> Traffic {
        if self.bulk.load(Ordering::Relaxed) { Traffic::Bulk } else { Traffic::Control }
    }

    pub(crate) fn mark_bulk(&self) {
        self.bulk.store(true, Ordering::Relaxed);
    }

    pub(crate) fn life(&self) -> watch::Receiver<Life> {
        self.life.subscribe()
    }

    pub(crate) fn is_accepted(&self) -> bool {
        *self.life.borrow() == Life::Accepted
    }

    /// The other side has answered something, so it has admitted us.
    pub(crate) fn mark_accepted(&self) {
        self.life.send_if_modified(|life| {
            let proven = *life == Life::Unproven;
            if proven {
                *life = Life::Accepted;
            }
            proven
        });
    }

    /// Records the end, and says what it means: a remote that ends a connection before answering anything refuses us.
    pub(crate) fn mark_ended(&self, by: EndedBy) -> Life {
        self.outbound_slots.close();
        self.life.send_modify(|life| {
            *life = match (*life, by) {
                (Life::Unproven, EndedBy::Remote) | (Life::Refused, _) => Life::Refused,
                _ => Life::Closed,
            };
        });
        *self.life.borrow()
    }

    /// Records an answered liveness check; true for the first one.
    pub(crate) fn record_round_trip(&self, round_trip: Duration) -> bool {
        self.heard.store(self.age_in_milliseconds(), Ordering::Relaxed);
        let microseconds = u64::try_from(round_trip.as_micros()).unwrap_or(u64::MAX - 1);
        self.round_trip.swap(microseconds + 1, Ordering::Relaxed) == 0
    }

    /// True while the peer was heard within `limit`: a connection that lost its other end stays listed for a while.
    fn is_fresh(&self, limit: Duration) -> bool {
        let silence = self.age_in_milliseconds().saturating_sub(self.heard.load(Ordering::Relaxed));
        u128::from(silence) <= limit.as_millis()
    }

    fn age_in_milliseconds(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub(crate) fn info(&self) -> ConnectionInfo {
        let round_trip = self.round_trip.load(Ordering::Relaxed).checked_sub(1).map(Duration::from_micros);
        ConnectionInfo {
            peer: self.peer,
            role: self.role,
            traffic: self.traffic(),
            direction: self.direction,
            address: self.address.clone(),
            since: self.since,
            round_trip,
        }
    }
}

/// All live connections by peer, oldest first. A peer without connections has no entry.
#[derive(Debug, Default)]
pub(crate) struct Table {
    connections: RwLock<HashMap<PeerId, Vec<Arc<Connection>>>>,
}

impl Table {
    fn read(&self) -> RwLockReadGuard<'_, HashMap<PeerId, Vec<Arc<Connection>>>> {
        self.connections.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<PeerId, Vec<Arc<Connection>>>> {
        self.connections.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn insert(&self, connection: Arc<Connection>) {
        self.write().entry(connection.peer).or_default().push(connection);
    }

    pub(crate) fn remove(&self, peer: PeerId, id: ConnectionId) -> Option<Arc<Connection>> {
        let mut connections = self.write();
        let list = connections.get_mut(&peer)?;
        let removed = list.iter().position(|connection| connection.id == id).map(|index| list.remove(index));
        if list.is_empty() {
            connections.remove(&peer);
        }
        removed
    }

    pub(crate) fn get(&self, peer: PeerId, id: ConnectionId) -> Option<Arc<Connection>> {
        self.read().get(&peer)?.iter().find(|connection| connection.id == id).cloned()
    }

    pub(crate) fn of_peer(&self, peer: PeerId) -> Vec<Arc<Connection>> {
        self.read().get(&peer).cloned().unwrap_or_default()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Connection>> {
        self.read().values().flatten().cloned().collect()
    }

    pub(crate) fn peers(&self) -> usize {
        self.read().len()
    }

    /// The oldest connection of the wanted kind; any other one before none at all, and a silent one last of all.
    pub(crate) fn choose(&self, peer: PeerId, traffic: Traffic, silence_limit: Duration) -> Option<Arc<Connection>> {
        let connections = self.read();
        let order = |connection: &&Arc<Connection>| {
            (!connection.is_fresh(silence_limit), !connection.is_accepted(), connection.traffic() != traffic)
        };
        connections.get(&peer)?.iter().min_by_key(order).cloned()
    }
}
