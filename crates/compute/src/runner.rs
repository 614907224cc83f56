//! The engine in another process: the *runner*, which alone holds the engine's socket and may enter containers' networks.
//!
//! The process that speaks with other machines holds one end of a pair of sockets ([`RunnerEngine`]); the runner serves
//! the other ([`server::serve`]). Each call has a connection of its own, which is sent over the pair, so that slow streams
//! hold up nothing, and whoever hangs up ends his call. There is no call that names an option of the engine: a container
//! is made from an [`crate::order::Order`].

pub mod channel;
mod client;
mod guard;
mod message;
pub mod server;

pub use channel::Channel;
pub use client::{Remote, RunnerEngine};
