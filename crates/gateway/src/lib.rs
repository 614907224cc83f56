//! The public gateway: visitors' HTTPS on one side, streams to providers on the other, and nothing else.
//!
//! It runs no user's code and links no container engine (I5). [`strict`] decides what is HTTP, [`names`] which name is
//! meant, [`leases`] who serves it, [`limits`] how much, [`proxy`] carries a request, [`pool`] its streams, [`listen`]
//! holds the door, [`lease_streams`] listens to providers, [`providers`] is the allow list, [`gateway`] owns it all.

pub mod body;
pub mod certificates;
pub mod command;
pub mod gateway;
pub mod headers;
pub mod identity;
pub mod idle;
pub mod lease_streams;
pub mod leases;
pub mod limits;
pub mod listen;
pub mod metrics;
mod metrics_listen;
pub mod names;
pub mod pages;
pub mod pool;
pub mod providers;
pub mod proxy;
mod relay;
pub mod settings;
pub mod strict;
pub mod visitor_io;
