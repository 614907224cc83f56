//! The public door: terminates TLS and hands visitors to the deployments of providers that are connected to it.

use std::process::ExitCode;

use clap::Parser as _;
use peer_gateway::command::{self, Arguments};

fn main() -> ExitCode {
    command::execute(Arguments::parse())
}
