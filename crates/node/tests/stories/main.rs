//! The whole product through its public programs: real daemons, real sockets, a real container engine.
//!
//! Attack tests are named by the threat that they stand for (`docs/threat-model.md`); a name that begins with `alone_` runs
//! with no other test beside it. One machine's loopback serves all machines of a test.

#![expect(clippy::unwrap_used, clippy::print_stderr, reason = "a failing step is a failing test, and says why")]

mod bad_input;
mod commands;
mod controls;
mod crash;
mod doctor;
mod emergency;
mod engines;
mod flood;
mod floods;
mod forwarder;
mod gateway;
mod identity;
mod images;
mod isolation;
mod isolation_engines;
mod lifecycle;
mod main_job;
mod owner;
mod ownership;
mod privileges;
mod replay;
mod requests;
mod revocation;
mod rotation;
mod sealing;
mod service;
mod takeover;
mod trust;
mod wall;
mod world;
