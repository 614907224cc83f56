//! Streams on one connection. The handler turns queued requests into outbound streams and hands inbound ones on;
//! [`Streams`] makes one handler for each admitted connection and lists the connection in the table.

use std::collections::HashSet;
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::iter::{Chain, Once};
use std::option;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use libp2p::core::transport::PortUse;
use libp2p::core::upgrade::{InboundUpgrade, OutboundUpgrade, UpgradeInfo};
use libp2p::core::{ConnectedPoint, Endpoint};
use libp2p::swarm::handler::{ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound};
use libp2p::swarm::{
    ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, FromSwarm, NetworkBehaviour,
    StreamUpgradeError, SubstreamProtocol, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
};
use libp2p::{Multiaddr, PeerId};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use crate::connection::{Connection, Direction, Established, Traffic};
use crate::counters::count;
use crate::gate::NotAdmitted;
use crate::network::Shared;
use crate::protocol::{BULK_MARKER, Protocol};
use crate::streams::{InboundStream, Stream};

/// Longest negotiation of one stream's protocol.
const NEGOTIATION_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests that may wait for the handler's next turn; those who open wait for room.
const REQUEST_QUEUE: usize = 64;

/// One stream wanted on a connection.
#[derive(Debug)]
pub(crate) struct OpenRequest {
    pub(crate) protocol: Protocol,
    /// Whether to wait for the peer's agreement.
    pub(crate) agreement: Agreement,
    pub(crate) slot: OwnedSemaphorePermit,
    pub(crate) reply: oneshot::Sender<Result<Stream, StreamFailure>>,
}

/// When an outbound stream is given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Agreement {
    /// Once the peer has agreed to the protocol.
    Awaited,
    /// At once; the agreement is checked with the first read.
    Early,
}

/// Why a live connection did not give a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum StreamFailure {
    NotOffered,
    TimedOut,
    Broken(String),
}

/// What an outbound negotiation is for.
#[derive(Debug)]
pub(crate) enum Opening {
    Marker,
    Request(OpenRequest),
}

/// The protocols offered to the remote; the outcome is the stream and the one that was chosen.
#[derive(Debug, Clone)]
pub(crate) struct Offer(Arc<[Protocol]>);

impl UpgradeInfo for Offer {
    type Info = Protocol;
    type InfoIter = Vec<Protocol>;

    fn protocol_info(&self) -> Self::InfoIter {
        self.0.to_vec()
    }
}

impl InboundUpgrade<libp2p::Stream> for Offer {
    type Output = (libp2p::Stream, Protocol);
    type Error = Infallible;
    type Future = Ready<Result<Self::Output, Self::Error>>;

    fn upgrade_inbound(self, stream: libp2p::Stream, protocol: Protocol) -> Self::Future {
        ready(Ok((stream, protocol)))
    }
}

/// Proposed after the wanted protocol, so that this one is not the last choice: the last one is taken for agreed before
/// the remote has answered.
const NO_AGREEMENT: Protocol = Protocol::new("/peer-compute/none");

/// The one protocol proposed to the remote.
#[derive(Debug, Clone)]
pub(crate) struct Proposal {
    protocol: Protocol,
    agreement: Agreement,
}

/// The remote did not agree.
#[derive(Debug)]
pub(crate) struct Disagreed;

impl UpgradeInfo for Proposal {
    type Info = Protocol;
    type InfoIter = Chain<Once<Protocol>, option::IntoIter<Protocol>>;

    fn protocol_info(&self) -> Self::InfoIter {
        let fallback = (self.agreement == Agreement::Awaited).then_some(NO_AGREEMENT);
        std::iter::once(self.protocol).chain(fallback)
    }
}

impl OutboundUpgrade<libp2p::Stream> for Proposal {
    type Output = libp2p::Stream;
    type Error = Disagreed;
    type Future = Ready<Result<Self::Output, Self::Error>>;

    fn upgrade_outbound(self, stream: libp2p::Stream, protocol: Protocol) -> Self::Future {
        ready(if protocol == NO_AGREEMENT { Err(Disagreed) } else { Ok(stream) })
    }
}

#[derive(Debug)]
pub(crate) struct Handler {
    connection: Arc<Connection>,
    offered: Arc<[Protocol]>,
    requests: mpsc::Receiver<OpenRequest>,
    /// Streams of ours whose protocol the remote has not agreed to yet; the remote bounds them too.
    proposed: usize,
    marker_wanted: bool,
    refusal_reported: bool,
    incoming: mpsc::Sender<InboundStream>,
    shared: Arc<Shared>,
}

impl Handler {
    fn accept(&mut self, inner: libp2p::Stream, protocol: Protocol) {
        if protocol == BULK_MARKER {
            if self.connection.direction == Direction::Inbound {
                self.connection.mark_bulk();
            }
            return;
        }
        let Ok(slot) = Arc::clone(&self.connection.inbound_slots).try_acquire_owned() else {
            return self.refuse(protocol, "the peer has too many open streams");
        };
        let stream = InboundStream {
            peer: self.connection.peer,
            role: self.connection.role,
            protocol,
            address: self.connection.address.clone(),
            stream: Stream::new(inner, self.connection.peer, protocol, slot),
        };
        match self.incoming.try_send(stream) {
            Ok(()) => count(&self.shared.counters.streams_accepted),
            Err(_) => self.refuse(protocol, "too many streams wait to be served"),
        }
    }

    /// The stream has been dropped, which resets it. Each one is counted; the log says it once per connection.
    fn refuse(&mut self, protocol: Protocol, reason: &'static str) {
        count(&self.shared.counters.streams_refused);
        if !self.refusal_reported {
            self.refusal_reported = true;
            tracing::warn!(peer = %self.connection.peer, %protocol, reason, "inbound stream reset");
        }
    }

    fn opened(&self, inner: libp2p::Stream, opening: Opening) {
        let Opening::Request(OpenRequest { protocol, agreement, slot, reply }) = opening else { return };
        if agreement == Agreement::Awaited {
            self.connection.mark_accepted();
        }
        count(&self.shared.counters.streams_opened);
        // An opener that has given up drops its end, and the stream with it.
        drop(reply.send(Ok(Stream::new(inner, self.connection.peer, protocol, slot))));
    }

    fn failed(opening: Opening, error: StreamUpgradeError<Disagreed>) {
        let Opening::Request(OpenRequest { reply, .. }) = opening else { return };
        let failure = match error {
            StreamUpgradeError::NegotiationFailed | StreamUpgradeError::Apply(Disagreed) => StreamFailure::NotOffered,
            StreamUpgradeError::Timeout => StreamFailure::TimedOut,
            StreamUpgradeError::Io(error) => StreamFailure::Broken(error.to_string()),
        };
        drop(reply.send(Err(failure)));
    }
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Infallible;
    type ToBehaviour = Infallible;
    type InboundProtocol = Offer;
    type OutboundProtocol = Proposal;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = Opening;

    fn listen_protocol(&self) -> SubstreamProtocol<Self::InboundProtocol> {
        SubstreamProtocol::new(Offer(Arc::clone(&self.offered)), ()).with_timeout(NEGOTIATION_TIMEOUT)
    }

    fn poll(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<Self::OutboundProtocol, Self::OutboundOpenInfo, Self::ToBehaviour>> {
        let propose = |protocol, agreement, opening| {
            let proposal = Proposal { protocol, agreement };
            let protocol = SubstreamProtocol::new(proposal, opening).with_timeout(NEGOTIATION_TIMEOUT);
            Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol })
        };
        if std::mem::take(&mut self.marker_wanted) {
            self.proposed += 1;
            return propose(BULK_MARKER, Agreement::Awaited, Opening::Marker);
        }
        // Each end of a proposal is an event of this connection, after which this is asked again.
        while self.proposed < self.shared.options.limits.proposed_streams(self.connection.role)
            && let Poll::Ready(Some(request)) = self.requests.poll_recv(context)
        {
            if !request.reply.is_closed() {
                self.proposed += 1;
                return propose(request.protocol, request.agreement, Opening::Request(request));
            }
        }
        Poll::Pending
    }

    fn on_behaviour_event(&mut self, event: Self::FromBehaviour) {
        match event {}
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<'_, Self::InboundProtocol, Self::OutboundProtocol, (), Opening>,
    ) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound {
                protocol: (stream, protocol), ..
            }) => {
                self.connection.mark_accepted();
                self.accept(stream, protocol);
            }
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound { protocol: stream, info }) => {
                self.proposed = self.proposed.saturating_sub(1);
                self.opened(stream, info);
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { info, error }) => {
                self.proposed = self.proposed.saturating_sub(1);
                Self::failed(info, error);
            }
            _ => {}
        }
    }
}

/// Makes the handlers and keeps the table of connections complete.
#[derive(Debug)]
pub(crate) struct Streams {
    shared: Arc<Shared>,
    /// Dials whose connection will be the bulk one.
    bulk_dials: HashSet<ConnectionId>,
    /// The connection between its handler's making and the swarm's word that no behaviour has refused it.
    nascent: Option<Arc<Connection>>,
    incoming: mpsc::Sender<InboundStream>,
}

impl Streams {
    pub(crate) fn new(shared: Arc<Shared>, incoming: mpsc::Sender<InboundStream>) -> Self {
        Self { shared, bulk_dials: HashSet::new(), nascent: None, incoming }
    }

    /// Announces that the dial with this id makes a bulk connection.
    pub(crate) fn expect_bulk(&mut self, id: ConnectionId) {
        self.bulk_dials.insert(id);
    }

    fn handler(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        direction: Direction,
    ) -> Result<Handler, ConnectionDenied> {
        let role = self.shared.policy().role(&peer).ok_or_else(|| ConnectionDenied::new(NotAdmitted))?;
        let limits = &self.shared.options.limits;
        let bulk = self.bulk_dials.remove(&id);
        let (requests, queue) = mpsc::channel(REQUEST_QUEUE);
        let established = Established {
            id,
            peer,
            role,
            direction,
            address: address.clone(),
            traffic: if bulk { Traffic::Bulk } else { Traffic::Control },
            outbound_streams: limits.outbound_streams(role),
            inbound_slots: self.shared.shares.of(peer, role, limits).slots,
        };
        let connection = Arc::new(Connection::new(established, requests));
        self.nascent = Some(Arc::clone(&connection));
        Ok(Handler {
            connection,
            offered: self.shared.protocols.offered_to(role),
            requests: queue,
            proposed: 0,
            marker_wanted: bulk,
            refusal_reported: false,
            incoming: self.incoming.clone(),
            shared: Arc::clone(&self.shared),
        })
    }
}

impl NetworkBehaviour for Streams {
    type ConnectionHandler = Handler;
    type ToSwarm = Infallible;

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        _local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.handler(id, peer, remote, Direction::Inbound)
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        _role: Endpoint,
        _port_use: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.handler(id, peer, address, Direction::Outbound)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::ConnectionEstablished(established) => {
                if let Some(connection) = self.nascent.take_if(|nascent| nascent.id == established.connection_id) {
                    debug_assert_eq!(
                        matches!(established.endpoint, ConnectedPoint::Dialer { .. }),
                        connection.direction == Direction::Outbound
                    );
                    count(&self.shared.counters.connections_established);
                    self.shared.table.insert(connection);
                }
            }
            FromSwarm::DialFailure(failure) => {
                self.bulk_dials.remove(&failure.connection_id);
                self.nascent = None;
            }
            FromSwarm::ListenFailure(_) => self.nascent = None,
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
