//! Every bound of the network, in one place, with its default.

use std::num::NonZeroU32;
use std::time::Duration;

use libp2p::Multiaddr;

use crate::gate::Role;

/// How a [`crate::Network`] listens, waits and bounds itself.
#[derive(Debug, Clone)]
pub struct Options {
    /// Addresses to listen on; empty means that this node only dials.
    pub listen: Vec<Multiaddr>,
    /// Bounds on connections and streams.
    pub limits: Limits,
    /// Longest time that dialling, the security handshake and choosing the multiplexer may take together.
    pub handshake_timeout: Duration,
    /// How long a connection without any stream is kept.
    pub idle_timeout: Duration,
    /// Pause between two liveness checks of a connection.
    pub ping_interval: Duration,
    /// Longest wait for the answer to a liveness check; two misses in a row close the connection.
    pub ping_timeout: Duration,
    /// Longest time that [`crate::Network::open`] takes, dialling included.
    pub open_timeout: Duration,
    /// First pause before dialling again; doubled with each failure.
    pub backoff_initial: Duration,
    /// Longest pause before dialling again.
    pub backoff_limit: Duration,
    /// Whether the dialling side keeps a second connection for bulk traffic.
    pub bulk_connection: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: Vec::new(),
            limits: Limits::default(),
            handshake_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_hours(6),
            ping_interval: Duration::from_secs(5),
            ping_timeout: Duration::from_secs(10),
            open_timeout: Duration::from_secs(15),
            backoff_initial: Duration::from_secs(1),
            backoff_limit: Duration::from_mins(1),
            bulk_connection: true,
        }
    }
}

/// Bounds on connections and streams.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Inbound handshakes in progress, over all addresses.
    pub pending_handshakes: usize,
    /// Inbound handshakes in progress from one address (IPv4 address or IPv6 /64 network).
    pub pending_handshakes_per_address: usize,
    /// Outbound connection attempts in progress.
    pub pending_dials: u32,
    /// Established connections, both directions.
    pub established: u32,
    /// Established connections that came from one address (IPv4 address or IPv6 /64 network).
    pub established_per_address: usize,
    /// Established connections with one peer, both directions.
    pub established_per_peer: u32,
    /// Streams opened by us that may be open at once on one connection with a gateway or a provider; more openers wait.
    pub outbound_streams_per_connection: usize,
    /// The same for one with a peer, of which there are two: one for control, one for bulk.
    pub outbound_streams_to_peer: usize,
    /// Streams opened by one peer that may be open at once over all of its connections; more are reset. It stands above
    /// twice the outbound bound, because this side learns a little later than the remote that a stream is over.
    pub inbound_streams_per_peer: usize,
    /// The same for a gateway, each of whose visits is a stream.
    pub inbound_streams_per_gateway: usize,
    /// The same for a provider at a gateway.
    pub inbound_streams_per_provider: usize,
    /// The same for a joiner, which needs one.
    pub inbound_streams_per_joiner: usize,
    /// New streams a second of one peer over all of its connections, and twice as many at once; whoever opens more is
    /// read more slowly. None: as many as it likes. Gateways are not bounded by it.
    pub stream_pace: Option<NonZeroU32>,
    /// Accepted streams that wait for [`crate::Incoming::next`], over all connections; more are reset. It holds the whole
    /// share of many peers, so that none fills it.
    pub incoming_queue: usize,
    /// Inbound streams whose protocol is being negotiated at once on one connection; more wait.
    pub negotiating_streams: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pending_handshakes: 64,
            pending_handshakes_per_address: 8,
            pending_dials: 256,
            established: 1024,
            established_per_address: 256,
            established_per_peer: 8,
            outbound_streams_per_connection: 1024,
            outbound_streams_to_peer: 32,
            inbound_streams_per_peer: 80,
            inbound_streams_per_gateway: 1280,
            inbound_streams_per_provider: 80,
            inbound_streams_per_joiner: 4,
            stream_pace: NonZeroU32::new(100),
            incoming_queue: 8192,
            negotiating_streams: 8,
        }
    }
}

impl Limits {
    /// Streams opened by us that may be open at once on one connection.
    pub(crate) fn outbound_streams(&self, role: Role) -> usize {
        match role {
            Role::Peer | Role::Joiner => self.outbound_streams_to_peer,
            Role::Gateway | Role::Provider => self.outbound_streams_per_connection,
        }
    }

    /// Streams that the multiplexer must bear on one connection: one more would end it, so it stands above what both sides
    /// count, with room for streams that are being negotiated or that were dropped a moment ago.
    pub(crate) fn multiplexed_streams(&self, role: Role) -> usize {
        const LARGEST: usize = 4096;
        let inbound = match role {
            Role::Peer => self.inbound_streams_per_peer,
            Role::Joiner => self.inbound_streams_per_joiner,
            Role::Gateway => self.inbound_streams_per_gateway,
            Role::Provider => self.inbound_streams_per_provider,
        };
        let counted = inbound + self.outbound_streams(role) + self.negotiating_streams + self.waiting_streams(role);
        (counted + counted / 2).min(LARGEST)
    }

    /// Streams of ours whose protocol is being negotiated at once on one connection; more wait. The other side has room for as many and
    /// more.
    pub(crate) fn proposed_streams(&self, role: Role) -> usize {
        match role {
            Role::Provider => 128,
            Role::Peer | Role::Joiner | Role::Gateway => self.negotiating_streams,
        }
    }

    /// Inbound streams that may wait for their negotiation to begin on one connection; more are reset.
    pub(crate) fn waiting_streams(&self, role: Role) -> usize {
        match role {
            Role::Gateway => 256,
            Role::Peer | Role::Joiner | Role::Provider => self.negotiating_streams,
        }
    }
}
