//! Runs authorised specifications inside the isolation profile and reports their lives.
//!
//! - [`engine`] is the seam to the container engine; [`engine::docker`] is the one implementation.
//! - [`profile`] turns a specification into a [`profile::ContainerPlan`], which cannot say "privileged", and is the
//!   only place where the engine's options are built; [`inspect`] compares them with what the engine reports (I1, I2).
//! - [`order`] is what the engine's side takes: the request that the owner signed, verified once more there.
//! - [`runner`] puts the engine into another process than the one that speaks with other machines.
//! - [`connector`] reaches a container's port from inside its network namespace, so that nothing is published.
//! - [`guest_program`] is the program of ours that runs inside containers' networks.
//! - [`wall`] lets containers out to public addresses where that is granted, and to nothing of the host.
//! - [`image`] moves images as layers named by their digests, without a registry.
//! - [`logflood`] and [`usage`] watch what a running container does to the machine.

pub mod connector;
pub mod deployment;
mod driver;
pub mod engine;
pub mod fetch;
pub mod guest_program;
pub mod image;
pub mod inspect;
pub mod isolation;
pub mod ledger;
pub mod logflood;
pub mod order;
pub mod possession;
pub mod profile;
pub mod record;
pub mod room;
pub mod runner;
pub mod succession;
pub mod usage;
pub mod wall;
