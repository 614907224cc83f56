//! What the two sides say. Durations are milliseconds.

use std::net::Ipv4Addr;

use minicbor::{Decode, Encode};
use peer_proto::{
    deploy::{Limits, RegistryReference},
    id::{DeploymentId, Digest},
    unit::Port,
};

use crate::{
    connector::ConnectError,
    engine::{ContainerId, EngineError, LogOptions, NetworkPlan, PullProgress, Target},
    order::Order,
    wall::rules::FilterOrder,
};

/// Largest call (bytes): an order holds a signed request.
pub(super) const CALL_MAX: usize = 2 << 20;

/// One call: what [`crate::engine::Engine`] offers, and nothing else.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub(super) enum Call {
    #[n(0)]
    Facts,
    #[n(1)]
    Images,
    #[n(2)]
    HasImage(#[n(0)] Digest),
    /// The bytes of the layers that have a size follow, in this order, each layer once.
    #[n(3)]
    Load(#[n(0)] Load),
    #[n(4)]
    Export(#[n(0)] String),
    #[n(5)]
    Resolve(#[n(0)] String),
    #[n(6)]
    Pull(#[n(0)] RegistryReference, #[n(1)] u64),
    #[n(7)]
    RemoveImage(#[n(0)] Digest),
    #[n(8)]
    Mark(#[n(0)] String),
    #[n(9)]
    Plan(#[n(0)] Box<Order>),
    #[n(10)]
    Create(#[n(0)] DeploymentId),
    #[n(11)]
    Inspect(#[n(0)] String),
    #[n(12)]
    Start(#[n(0)] ContainerId),
    #[n(13)]
    Began(#[n(0)] ContainerId),
    #[n(14)]
    Stop(#[n(0)] ContainerId, #[n(1)] u64),
    #[n(15)]
    Kill(#[n(0)] ContainerId),
    #[n(16)]
    Remove(#[n(0)] ContainerId),
    #[n(17)]
    Wait(#[n(0)] ContainerId, #[n(1)] u64),
    #[n(18)]
    List(#[n(0)] String),
    #[n(19)]
    Logs(#[n(0)] ContainerId, #[n(1)] LogOptions),
    #[n(20)]
    LogGrowth(#[n(0)] ContainerId),
    #[n(21)]
    Usage(#[n(0)] ContainerId, #[n(1)] Limits),
    /// After the answer, connections of [`Connect`] are sent over this one, until it is closed.
    #[n(22)]
    Network(#[n(0)] ContainerId, #[n(1)] Port),
    #[n(23)]
    Pause(#[n(0)] ContainerId),
    #[n(24)]
    Unpause(#[n(0)] ContainerId),
    #[n(25)]
    Networks(#[n(0)] String),
    #[n(26)]
    CompareNetwork(#[n(0)] NetworkPlan),
    #[n(27)]
    CreateNetwork(#[n(0)] NetworkPlan),
    #[n(28)]
    RemoveNetwork(#[n(0)] String),
    #[n(29)]
    StartTest(#[n(0)] NetworkPlan),
    #[n(30)]
    Filter(#[n(0)] FilterOrder),
    /// After a good answer the two sockets follow: the one for datagrams first.
    #[n(31)]
    ResolverSockets(#[n(0)] Ipv4Addr),
    #[n(32)]
    Reach(#[n(0)] ContainerId, #[n(1)] Vec<Target>, #[n(2)] u64),
}

/// An image to load.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Load {
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub(super) configuration: Vec<u8>,
    #[n(1)]
    pub(super) layers: Vec<Layer>,
}

/// One layer of it: its digest and, if it follows, its size (bytes).
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Layer {
    #[n(0)]
    pub(super) digest: Digest,
    #[n(1)]
    pub(super) size: Option<u64>,
}

/// Asks for a connection inside a network; its descriptor follows a good answer, which says what it is.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
#[cbor(map)]
pub(super) struct Connect {
    #[n(0)]
    pub(super) port: Port,
    #[n(1)]
    pub(super) within: u64,
}

/// What a connection's descriptor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub(super) enum Kind {
    /// A socket inside the container's network.
    #[n(0)]
    Tcp,
    /// The end of a pair whose other end a forwarder serves.
    #[n(1)]
    Unix,
}

/// By which way the runner reaches a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub(super) enum By {
    /// It enters it.
    #[n(0)]
    Entering,
    /// A forwarder carries connections.
    #[n(1)]
    Forwarding,
}

/// An answer, or one piece of a stream, whose end is `None`.
pub(super) type Answer<T> = Result<T, EngineError>;

/// A stored JSON text: a report of the engine, or what it would be told.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
#[cbor(transparent)]
pub(super) struct Json(
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub(super) Vec<u8>,
);

/// A piece of an image.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
#[cbor(transparent)]
pub(super) struct Piece(
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub(super) Vec<u8>,
);

#[derive(Debug, Clone, PartialEq, Encode, Decode)]
#[cbor(map)]
pub(super) struct PlannedMessage {
    #[n(0)]
    pub(super) deployment: DeploymentId,
    #[n(1)]
    pub(super) told: Json,
}

/// How far a pull is, and at the end the image.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub(super) enum Pulling {
    #[n(0)]
    Progress(#[n(0)] PullProgress),
    #[n(1)]
    Done(#[n(0)] Digest),
}

/// Why a network or a port could not be reached.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub(super) enum Unreachable {
    #[n(0)]
    NotRunning,
    #[n(1)]
    NotPermitted,
    #[n(2)]
    HostNetwork,
    #[n(3)]
    Closed(#[n(0)] Port),
    #[n(4)]
    TimedOut(#[n(0)] Port),
    #[n(5)]
    Engine(#[n(0)] EngineError),
    #[n(6)]
    System(#[n(0)] String),
    #[n(7)]
    Elsewhere,
}

impl From<ConnectError> for Unreachable {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::NotRunning => Self::NotRunning,
            ConnectError::NotPermitted => Self::NotPermitted,
            ConnectError::Elsewhere => Self::Elsewhere,
            ConnectError::HostNetwork => Self::HostNetwork,
            ConnectError::Closed { port } => Self::Closed(port),
            ConnectError::TimedOut { port } => Self::TimedOut(port),
            ConnectError::Engine(error) => Self::Engine(error),
            ConnectError::System(error) => Self::System(error.to_string()),
        }
    }
}

impl From<Unreachable> for ConnectError {
    fn from(error: Unreachable) -> Self {
        match error {
            Unreachable::NotRunning => Self::NotRunning,
            Unreachable::NotPermitted => Self::NotPermitted,
            Unreachable::Elsewhere => Self::Elsewhere,
            Unreachable::HostNetwork => Self::HostNetwork,
            Unreachable::Closed(port) => Self::Closed { port },
            Unreachable::TimedOut(port) => Self::TimedOut { port },
            Unreachable::Engine(error) => Self::Engine(error),
            Unreachable::System(reason) => Self::System(std::io::Error::other(reason)),
        }
    }
}
