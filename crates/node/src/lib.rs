//! Wires the rooms together, serves the local interface, and speaks to people.
//!
//! `peerd` is [`program`], and what it holds is [`daemon::Daemon`]; `peerctl` is [`cli`]. Requests go down: local interface or peer stream, then `dispatch`,
//! then trust, then a room, then the engine. Facts come back up the same stream.

pub mod api;
mod attempts;
pub mod bandwidth;
pub mod card;
pub mod cli;
pub mod clock;
pub mod confinement;
pub mod daemon;
pub mod dispatch;
mod emergency;
pub mod gateways;
pub mod health;
pub mod ingress;
pub mod introduction;
pub mod metrics;
pub mod node;
pub mod notices;
pub mod policy;
pub mod program;
pub mod protocols;
pub mod quota;
pub mod refusals;
pub mod requester;
pub mod settings;
pub mod statements;
mod withdrawal;
