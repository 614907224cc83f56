//! Who may connect. Two small behaviours that stand before all others, so that a refusal costs nothing further in:
//! [`HandshakeGate`] bounds handshakes and connections by address, [`PolicyGate`] admits PeerIds.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::multiaddr::Protocol as Component;
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
    dummy,
};
use libp2p::{Multiaddr, PeerId};

use crate::network::Shared;

/// What a remote PeerId is to us; it decides the protocols that the remote may open here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// A trusted peer.
    Peer,
    /// Somebody who holds one of our join tickets, under the ticket's temporary PeerId.
    Joiner,
    /// A gateway that we use.
    Gateway,
    /// A provider that uses our gateway.
    Provider,
}

/// What the policy says of one PeerId.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admission {
    /// What the peer may do here.
    pub role: Role,
    /// Addresses to stay connected to; empty means that the peer is never dialled.
    pub addresses: Vec<Multiaddr>,
}

/// The whole gate as one value; whoever is not in it is refused.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// Everybody who may connect.
    pub admitted: HashMap<PeerId, Admission>,
}

impl Policy {
    pub(crate) fn role(&self, peer: &PeerId) -> Option<Role> {
        self.admitted.get(peer).map(|admission| admission.role)
    }
}

/// The PeerId is not in the policy.
#[derive(Debug, thiserror::Error)]
#[error("the peer is not admitted")]
pub(crate) struct NotAdmitted;

/// Too many handshakes are in progress.
#[derive(Debug, thiserror::Error)]
#[error("too many handshakes in progress")]
pub(crate) struct TooManyHandshakes;

/// Too many connections from one address are established.
#[derive(Debug, thiserror::Error)]
#[error("too many connections from one address")]
pub(crate) struct TooManyFromAddress;

/// Inbound connections by where they come from.
#[derive(Debug, Default)]
struct Tally {
    connections: HashMap<ConnectionId, IpAddr>,
    per_address: HashMap<IpAddr, usize>,
}

impl Tally {
    fn from(&self, address: &IpAddr) -> usize {
        self.per_address.get(address).copied().unwrap_or(0)
    }

    fn add(&mut self, id: ConnectionId, address: IpAddr) {
        if self.connections.insert(id, address).is_none() {
            *self.per_address.entry(address).or_default() += 1;
        }
    }

    fn remove(&mut self, id: ConnectionId) {
        let Some(address) = self.connections.remove(&id) else { return };
        if let Some(count) = self.per_address.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                self.per_address.remove(&address);
            }
        }
    }
}

/// Counts inbound handshakes in progress, in total and by address, and by address what they have become.
#[derive(Debug)]
pub(crate) struct HandshakeGate {
    shared: Arc<Shared>,
    /// From where nobody who is admitted is known to be.
    pending: Tally,
    /// From where somebody who is admitted is known to be: however many strangers knock, these find a place.
    pending_known: Tally,
    established: Tally,
}

impl HandshakeGate {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, pending: Tally::default(), pending_known: Tally::default(), established: Tally::default() }
    }

    fn begin(&mut self, id: ConnectionId, address: IpAddr) -> Result<(), TooManyHandshakes> {
        let limits = &self.shared.options.limits;
        let pending = if self.shared.known.contains(&address) { &mut self.pending_known } else { &mut self.pending };
        let all = pending.connections.len();
        if all >= limits.pending_handshakes || pending.from(&address) >= limits.pending_handshakes_per_address {
            return Err(TooManyHandshakes);
        }
        pending.add(id, address);
        self.publish();
        Ok(())
    }

    fn establish(&mut self, id: ConnectionId, address: IpAddr) -> Result<(), TooManyFromAddress> {
        self.pending.remove(id);
        self.pending_known.remove(id);
        self.publish();
        if self.established.from(&address) >= self.shared.options.limits.established_per_address {
            return Err(TooManyFromAddress);
        }
        self.established.add(id, address);
        Ok(())
    }

    fn end(&mut self, id: ConnectionId) {
        self.pending.remove(id);
        self.pending_known.remove(id);
        self.established.remove(id);
        self.publish();
    }

    fn publish(&self) {
        let pending = (self.pending.connections.len() + self.pending_known.connections.len()) as u64;
        self.shared.counters.handshakes_pending.store(pending, Ordering::Relaxed);
    }
}

/// The unit that connections are counted by: an IPv4 address, or an IPv6 /64, which one host can fill at will.
pub(crate) fn counted_address(address: &Multiaddr) -> IpAddr {
    for component in address {
        match component {
            Component::Ip4(address) => return IpAddr::V4(address),
            Component::Ip6(address) => {
                return match address.to_ipv4_mapped() {
                    Some(address) => IpAddr::V4(address),
                    None => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
                };
            }
            _ => {}
        }
    }
    IpAddr::V6(Ipv6Addr::UNSPECIFIED)
}

impl NetworkBehaviour for HandshakeGate {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_pending_inbound_connection(
        &mut self,
        id: ConnectionId,
        _local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.begin(id, counted_address(remote)).map_err(ConnectionDenied::new)
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        _peer: PeerId,
        _local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.establish(id, counted_address(remote)).map_err(ConnectionDenied::new)?;
        Ok(dummy::ConnectionHandler)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _id: ConnectionId,
        _peer: PeerId,
        _address: &Multiaddr,
        _role: Endpoint,
        _port_use: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            // Another behaviour may have refused what this one had let in.
            FromSwarm::ListenFailure(failure) => self.end(failure.connection_id),
            FromSwarm::ConnectionClosed(closed) => self.end(closed.connection_id),
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _peer: PeerId, _id: ConnectionId, event: THandlerOutEvent<Self>) {
        match event {}
    }

    fn poll(&mut self, _context: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}

/// Admits exactly the PeerIds of the current policy, in both directions.
#[derive(Debug)]
pub(crate) struct PolicyGate {
    shared: Arc<Shared>,
}

impl PolicyGate {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    fn check(&self, peer: Option<PeerId>) -> Result<(), ConnectionDenied> {
        match peer.and_then(|peer| self.shared.policy().role(&peer)) {
            Some(_) => Ok(()),
            None => Err(ConnectionDenied::new(NotAdmitted)),
        }
    }
}

impl NetworkBehaviour for PolicyGate {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_established_inbound_connection(
        &mut self,
        _id: ConnectionId,
        peer: PeerId,
        _local: &Multiaddr,
        _remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.check(Some(peer)).map(|()| dummy::ConnectionHandler)
    }

    fn handle_pending_outbound_connection(
        &mut self,
        _id: ConnectionId,
        peer: Option<PeerId>,
        _addresses: &[Multiaddr],
        _role: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        self.check(peer).map(|()| Vec::new())
    }

    fn handle_established_outbound_connection(
        &mut self,
        _id: ConnectionId,
        peer: PeerId,
        _address: &Multiaddr,
        _role: Endpoint,
        _port_use: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.check(Some(peer)).map(|()| dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, _event: FromSwarm<'_>) {}

    fn on_connection_handler_event(&mut self, _peer: PeerId, _id: ConnectionId, event: THandlerOutEvent<Self>) {
        match event {}
    }

    fn poll(&mut self, _context: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_counted_by_ipv4_address_or_ipv6_network() {
        let cases = [
            ("/ip4/192.0.2.1/tcp/1", "192.0.2.1"),
            ("/ip6/2001:db8:1:2:3:4:5:6/tcp/1", "2001:db8:1:2::"),
            ("/ip6/2001:db8:1:2:ffff::1/tcp/1", "2001:db8:1:2::"),
            ("/ip6/::ffff:192.0.2.1/tcp/1", "192.0.2.1"),
        ];
        for (address, expected) in cases {
            let address: Multiaddr = address.parse().expect("a valid address");
            assert_eq!(counted_address(&address).to_string(), expected, "{address}");
        }
    }
}
