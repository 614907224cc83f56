//! The network over real loopback sockets: the gate, the streams, the dialling.
#![expect(clippy::unwrap_used, reason = "tests")]

mod controls;
mod dialling;
mod fixture;
mod frames;
mod gate;
mod stream;
