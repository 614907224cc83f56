//! Networks as this room asks the engine for them, and what the engine says of them.

use std::net::{Ipv4Addr, SocketAddr};

use crate::wall::ranges::Range;
use crate::wall::rules::{Reach, Tag, Walled};

/// How one network of ours is made. Every field is of our own making.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkPlan {
    /// Whose it is on this host.
    pub tag: Tag,
    /// The mark of our containers, as its label.
    pub node: String,
    /// Its number.
    pub number: u16,
    /// Its addresses.
    pub subnet: Range,
    /// Whether it has a way out; how far is for the rules to say.
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkFacts {
    /// The engine's name for it.
    pub name: String,
    /// What differs from the plan it was compared with; nothing if it may be used.
    pub differences: Vec<String>,
}

/// What is tried from inside a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A connection to this address.
    Connection(SocketAddr),
    /// A datagram with a question to a resolver at this address; any answer counts.
    Question(SocketAddr),
}

/// The sockets at which one resolver listens.
#[derive(Debug)]
pub struct ResolverSockets {
    /// For questions in datagrams.
    pub datagrams: std::net::UdpSocket,
    /// For questions in connections.
    pub connections: std::net::TcpListener,
}
