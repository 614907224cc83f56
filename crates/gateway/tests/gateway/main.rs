//! The gateway on real sockets: a real provider network on one side, raw TLS visitors on the other.

#![expect(clippy::unwrap_used, reason = "a failing step is a failing test")]

mod abuse;
mod command_line;
mod forwarding;
mod names;
mod world;
