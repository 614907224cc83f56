//! How bytes reach a peer: connections to proven peers, a gate in front of everything, and streams on top.
//!
//! The room knows PeerIds, protocol names and bytes; it knows nothing of deployments, grants or files. Its parts:
//! [`gate`](Policy) decides who may connect, `driver` owns the one event loop and dials, `handler` opens and accepts
//! streams on one connection, [`Network`] is the handle that the rest of a program holds, and [`exchange`] reads and
//! writes frames with a size limit and a deadline.

mod connection;
mod counters;
mod dialling;
mod driver;
pub mod exchange;
mod gate;
mod handler;
mod known;
mod multiplex;
mod network;
mod once;
mod options;
mod protocol;
mod resolve;
mod share;
mod streams;
mod swarm;

pub use connection::{ConnectionInfo, ConnectionState, Direction, Traffic};
pub use counters::CountersSnapshot;
pub use dialling::back_off;
pub use gate::{Admission, Policy, Role};
pub use libp2p::Multiaddr;
pub use libp2p::identity::{Keypair, PeerId};
pub use network::{Network, NetworkEvent, OpenError, RefusalReason, StartError};
pub use once::{DialOnceError, Dialed, dial_once};
pub use options::{Limits, Options};
pub use protocol::{Protocol, Protocols};
pub use streams::{InboundStream, Incoming, Stream, TokioStream};
