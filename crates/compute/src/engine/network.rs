//! Networks as this room asks the engine for them, and what the engine says of them.

use std::net::{Ipv4Addr, SocketAddr};

use minicbor::{Decode, Encode};
use peer_proto::frame::as_text;

use crate::wall::ranges::Range;
use crate::wall::rules::{Reach, Tag, Walled};

/// How one network of ours is made. Every field is of our own making.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct NetworkPlan {
    /// Whose it is on this host.
    #[n(0)]
    pub tag: Tag,
    /// The mark of our containers, as its label.
    #[n(1)]
    pub node: String,
    /// Its number.
    #[n(2)]
    pub number: u16,
    /// Its addresses.
    #[n(3)]
    pub subnet: Range,
    /// Whether it has a way out; how far is for the rules to say.
    #[n(4)]
    pub outward: bool,
}

impl NetworkPlan {
    /// The engine's name for it.
    pub fn name(&self) -> String {
        self.tag.network(self.number)
    }

    /// The kernel's name of its bridge.
    pub fn bridge(&self) -> String {
        self.tag.bridge(self.number)
    }

    /// The bridge's own address.
    pub fn gateway(&self) -> Ipv4Addr {
        Walled { number: self.number, subnet: self.subnet, reach: Reach::Members }.gateway()
    }
}

/// A network as the engine reports it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct NetworkFacts {
    /// The engine's name for it.
    #[n(0)]
    pub name: String,
    /// What differs from the plan it was compared with; nothing if it may be used.
    #[n(1)]
    pub differences: Vec<String>,
}

/// What is tried from inside a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Target {
    /// A connection to this address.
    #[n(0)]
    Connection(
        #[n(0)]
        #[cbor(with = "as_text")]
        SocketAddr,
    ),
    /// A datagram with a question to a resolver at this address; any answer counts.
    #[n(1)]
    Question(
        #[n(0)]
        #[cbor(with = "as_text")]
        SocketAddr,
    ),
}

/// The sockets at which one resolver listens.
#[derive(Debug)]
pub struct ResolverSockets {
    /// For questions in datagrams.
    pub datagrams: std::net::UdpSocket,
    /// For questions in connections.
    pub connections: std::net::TcpListener,
}
