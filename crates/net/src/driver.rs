//! The one event loop: it alone holds the swarm. It listens, follows the policy, dials with back-off, and keeps the
//! table of connections true.

use std::collections::{HashMap, HashSet};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use libp2p::connection_limits::Exceeded;
use libp2p::core::transport::ListenerId;
use libp2p::multiaddr::Protocol as Component;
use libp2p::swarm::{ConnectionDenied, ConnectionId, ListenError, SwarmEvent};
use libp2p::{Multiaddr, PeerId, Swarm, ping};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::connection::{Direction, EndedBy, Life};
use crate::counters::count;
use crate::dialling::{Dialer, Lookup, back_off, innermost};
use crate::gate::{Policy, TooManyFromAddress, TooManyHandshakes};
use crate::network::{NetworkEvent, OpenError, RefusalReason, Shared, StartError};
use crate::swarm::{Behaviour, BehaviourEvent};

/// Those who may wait for one peer's connection at once.
const WAITERS_PER_PEER: usize = 1024;
/// Longest wait for a listener to name its address, which it does as soon as it is polled.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for connections to end in order when the network shuts down.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// A request from a handle.
#[derive(Debug)]
pub(crate) enum Command {
    /// Answer once a connection with the peer is there, or cannot be made.
    Connect { peer: PeerId, reply: oneshot::Sender<Result<(), OpenError>> },
}

pub(crate) struct Driver {
    pub(crate) swarm: Swarm<Behaviour>,
    pub(crate) shared: Arc<Shared>,
    policy: watch::Receiver<Arc<Policy>>,
    commands: mpsc::Receiver<Command>,
    stop: CancellationToken,
    /// One entry for each admitted peer that has addresses.
    pub(crate) dialers: HashMap<PeerId, Dialer>,
    /// Look-ups of host names, at most one for each dialer.
    pub(crate) lookups: JoinSet<Lookup>,
    /// Peers announced as connected.
    announced: HashSet<PeerId>,
    /// Listeners that have named an address.
    named: HashSet<ListenerId>,
}

impl Driver {
    pub(crate) fn new(
        swarm: Swarm<Behaviour>,
        shared: Arc<Shared>,
        policy: watch::Receiver<Arc<Policy>>,
        commands: mpsc::Receiver<Command>,
        stop: CancellationToken,
    ) -> Self {
        let dialled = shared.policy();
        let dialled = dialled.admitted.iter().filter(|(_, admission)| !admission.addresses.is_empty());
        let dialers = dialled.map(|(peer, _)| (*peer, Dialer::due())).collect();
        let (announced, named, lookups) = (HashSet::new(), HashSet::new(), JoinSet::new());
        Self { swarm, shared, policy, commands, stop, dialers, lookups, announced, named }
    }

    /// Binds all listeners and waits until each has named its real address.
    pub(crate) async fn listen(&mut self) -> Result<(), StartError> {
        let addresses = self.shared.options.listen.clone();
        let failed = |address: &Multiaddr, reason| StartError::Listen { address: address.clone(), reason };
        for address in &addresses {
            probe(address).map_err(|error| failed(address, error.to_string()))?;
        }
        for address in &addresses {
            let id = self.swarm.listen_on(address.clone()).map_err(|error| failed(address, innermost(&error)))?;
            let naming = async {
                while !self.named.contains(&id) {
                    let event = self.swarm.select_next_some().await;
                    self.on_event(event);
                }
            };
            if tokio::time::timeout(LISTEN_TIMEOUT, naming).await.is_err() {
                return Err(failed(address, "the system named no local address".to_owned()));
            }
        }
        Ok(())
    }

    pub(crate) async fn run(mut self) {
        let mut policy_open = true;
        loop {
            self.dial_due();
            let next = self.dialers.values().filter_map(Dialer::next).min();
            let timer = async {
                match next {
                    Some(next) => tokio::time::sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.stop.cancelled() => break,
                changed = self.policy.changed(), if policy_open => match changed {
                    Ok(()) => self.replace_policy(),
                    // Nobody can change the policy any more; the last one stays in force.
                    Err(_) => policy_open = false,
                },
                Some(command) = self.commands.recv() => self.on_command(command),
                event = self.swarm.select_next_some() => self.on_event(event),
                Some(lookup) = self.lookups.join_next() => if let Ok(lookup) = lookup {
                    self.resolved(lookup);
                },
                () = timer => {}
            }
        }
        self.close().await;
    }

    /// Ends all connections; their streams learn it at once.
    async fn close(mut self) {
        self.commands.close();
        // Whoever dials us from now on is refused.
        self.shared.replace_policy(Arc::default());
        for dialer in self.dialers.values_mut() {
            dialer.answer(&Err(OpenError::Stopped));
        }
        for connection in self.shared.table.all() {
            self.end_peer(connection.peer, "the network is shutting down");
        }
        let emptied = async {
            while self.swarm.network_info().num_peers() > 0 {
                self.swarm.select_next_some().await;
            }
        };
        if tokio::time::timeout(CLOSE_TIMEOUT, emptied).await.is_err() {
            tracing::debug!("some connections did not end in order");
        }
    }

    fn replace_policy(&mut self) {
        let policy = self.policy.borrow_and_update().clone();
        let old = self.shared.replace_policy(Arc::clone(&policy));
        for (peer, admission) in &old.admitted {
            if policy.role(peer) != Some(admission.role) {
                self.end_peer(*peer, "the peer was removed or its role changed");
                self.shared.record_failure(*peer, None);
            }
        }
        for (peer, admission) in &policy.admitted {
            if admission.addresses.is_empty() {
                self.stop_dialling(
                    *peer,
                    OpenError::Offline {
                        peer: *peer,
                        tried: Vec::new(),
                        reason: "its addresses were removed".to_owned(),
                    },
                );
            } else if old.admitted.get(peer) != Some(admission) {
                let dialer = self.dialers.entry(*peer).or_default();
                dialer.failures = 0;
                dialer.wrong.clear();
                dialer.next = Some(Instant::now());
            }
        }
        let gone: Vec<_> = self.dialers.keys().filter(|peer| policy.role(peer).is_none()).copied().collect();
        for peer in gone {
            self.stop_dialling(peer, OpenError::NotAdmitted { peer });
        }
    }

    fn stop_dialling(&mut self, peer: PeerId, answer: OpenError) {
        if let Some(mut dialer) = self.dialers.remove(&peer) {
            dialer.answer(&Err(answer));
        }
    }

    /// Ends all connections with a peer and all attempts to make one.
    fn end_peer(&mut self, peer: PeerId, reason: &str) {
        // An error says that there was no connection; pending dials are aborted all the same.
        self.swarm.disconnect_peer_id(peer).ok();
        for connection in self.shared.table.of_peer(peer) {
            self.connection_ended(peer, connection.id, EndedBy::Us, reason);
        }
    }

    fn on_command(&mut self, command: Command) {
        let Command::Connect { peer, reply } = command;
        let outcome = if self.shared.policy().role(&peer).is_none() {
            Err(OpenError::NotAdmitted { peer })
        } else if !self.shared.table.of_peer(peer).is_empty() {
            Ok(())
        } else if let Some(dialer) = self.dialers.get_mut(&peer) {
            dialer.waiting.retain(|waiter| !waiter.is_closed());
            if dialer.waiting.len() < WAITERS_PER_PEER {
                dialer.failures = 0;
                dialer.next = Some(Instant::now());
                dialer.waiting.push(reply);
                return;
            }
            Err(OpenError::Busy { peer, limit: WAITERS_PER_PEER })
        } else {
            let reason = "it has not connected to us and none of its addresses is known".to_owned();
            Err(OpenError::Offline { peer, tried: Vec::new(), reason })
        };
        drop(reply.send(outcome));
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, .. } => {
                self.established(peer_id, connection_id);
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, cause, .. } => {
                let reason = cause.map_or_else(|| "closed".to_owned(), |cause| cause.to_string());
                self.connection_ended(peer_id, connection_id, EndedBy::Remote, &reason);
            }
            SwarmEvent::OutgoingConnectionError { peer_id: Some(peer), connection_id, error } => {
                self.dial_failed(peer, connection_id, error);
            }
            SwarmEvent::IncomingConnectionError { peer_id, send_back_addr, error, .. } => {
                self.refused(peer_id, send_back_addr, &error);
            }
            SwarmEvent::Behaviour(BehaviourEvent::Ping(ping::Event { peer, connection, result })) => match result {
                Ok(round_trip) => self.answered(peer, connection, round_trip),
                Err(error) => {
                    self.swarm.close_connection(connection);
                    let reason = format!("liveness check failed: {error}");
                    self.connection_ended(peer, connection, EndedBy::Us, &reason);
                }
            },
            SwarmEvent::NewListenAddr { listener_id, address } => {
                self.named.insert(listener_id);
                self.shared.edit_listening(|listening| listening.push(address));
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                self.shared.edit_listening(|listening| listening.retain(|listed| *listed != address));
            }
            SwarmEvent::ListenerClosed { addresses, reason, .. } => {
                tracing::warn!(?addresses, ?reason, "a listener has ended");
                self.shared.edit_listening(|listening| listening.retain(|listed| !addresses.contains(listed)));
            }
            SwarmEvent::ListenerError { error, .. } => tracing::warn!(%error, "a listener could not accept"),
            _ => {}
        }
    }

    fn established(&mut self, peer: PeerId, id: ConnectionId) {
        if let Some(dialer) = self.dialers.get_mut(&peer) {
            dialer.finish(id);
            dialer.answer(&Ok(()));
        }
        let connection = self.shared.table.get(peer, id);
        if let Some(connection) = connection.filter(|connection| connection.direction == Direction::Inbound) {
            self.shared.known.note(peer, &connection.address);
            self.announce(peer);
        }
    }

    /// The other side has answered a liveness check, so it has admitted us.
    fn answered(&mut self, peer: PeerId, id: ConnectionId, round_trip: Duration) {
        let Some(connection) = self.shared.table.get(peer, id) else { return };
        connection.mark_accepted();
        if connection.record_round_trip(round_trip) {
            self.announce(peer);
            self.shared.record_failure(peer, None);
            if let Some(dialer) = self.dialers.get_mut(&peer) {
                dialer.failures = 0;
                dialer.next = Some(Instant::now());
            }
        }
    }

    fn announce(&mut self, peer: PeerId) {
        if self.announced.insert(peer) {
            self.shared.publish(NetworkEvent::Connected { peer });
        }
    }

    /// Takes a connection out of the table; the second call for the same one does nothing.
    fn connection_ended(&mut self, peer: PeerId, id: ConnectionId, by: EndedBy, reason: &str) {
        let Some(connection) = self.shared.table.remove(peer, id) else { return };
        if connection.mark_ended(by) == Life::Refused {
            count(&self.shared.counters.refused_by_peer);
            self.shared.publish(NetworkEvent::RefusedByPeer { peer, address: connection.address.clone() });
            self.retry_later(peer, OpenError::RefusedByPeer { peer });
        } else if let Some(dialer) = self.dialers.get_mut(&peer) {
            dialer.next = Some(Instant::now() + back_off(&self.shared.options, dialer.failures));
        }
        if self.shared.table.of_peer(peer).is_empty() && self.announced.remove(&peer) {
            self.shared.publish(NetworkEvent::Disconnected { peer, reason: reason.to_owned() });
        }
    }

    fn refused(&self, peer: Option<PeerId>, address: Multiaddr, error: &ListenError) {
        let counters = &self.shared.counters;
        let ListenError::Denied { cause } = error else {
            count(&counters.handshakes_failed);
            tracing::debug!(%address, %error, "inbound handshake failed");
            return;
        };
        let reason = refusal_reason(cause);
        count(match reason {
            RefusalReason::NotAdmitted => &counters.connections_not_admitted,
            RefusalReason::TooManyHandshakes | RefusalReason::TooManyConnections => &counters.connections_over_limit,
        });
        self.shared.publish(NetworkEvent::Refused { peer, address, reason });
    }
}

fn refusal_reason(cause: &ConnectionDenied) -> RefusalReason {
    if cause.downcast_ref::<TooManyHandshakes>().is_some() {
        RefusalReason::TooManyHandshakes
    } else if cause.downcast_ref::<TooManyFromAddress>().is_some() || cause.downcast_ref::<Exceeded>().is_some() {
        RefusalReason::TooManyConnections
    } else {
        RefusalReason::NotAdmitted
    }
}

/// Fails if the address is taken. The transport lets several listeners share a port, which would silently give each of
/// two daemons some of the connections; a plain socket does not share.
fn probe(address: &Multiaddr) -> std::io::Result<()> {
    let ip = address.iter().find_map(|component| match component {
        Component::Ip4(ip) => Some(IpAddr::V4(ip)),
        // A plain socket on all IPv6 addresses would take the IPv4 ones too, which may rightly be somebody else's.
        Component::Ip6(ip) if ip.is_unspecified() => Some(IpAddr::V6(Ipv6Addr::LOCALHOST)),
        Component::Ip6(ip) => Some(IpAddr::V6(ip)),
        _ => None,
    });
    let port = address.iter().find_map(|component| match component {
        Component::Tcp(port) if port != 0 => Some(port),
        _ => None,
    });
    // Any free port is free, and every other fault is for the transport to report.
    let (Some(ip), Some(port)) = (ip, port) else { return Ok(()) };
    match TcpListener::bind((ip, port)) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => Err(error),
        _ => Ok(()),
    }
}
