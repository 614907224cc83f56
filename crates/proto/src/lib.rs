//! The vocabulary of Peer Compute: identifiers, units, signed envelopes, messages and bounded frames.
//!
//! This room is pure. It opens no file and no socket, reads no clock and starts no task: whoever needs "now" passes it in.
//! Everything that arrives from another machine is decoded here, by [`frame::decode_strict`] and nothing else.

pub mod card;
pub mod code;
pub mod control;
pub mod deploy;
pub mod envelope;
pub mod frame;
pub mod grant;
pub mod hours;
pub mod id;
pub mod identity;
pub mod join;
pub mod limits;
pub mod panic;
pub mod pause;
pub mod query;
pub mod statement;
pub mod text;
pub mod tunnel;
pub mod unit;

pub use libp2p_identity::PeerId;
pub use multiaddr::Multiaddr;
