//! The public door: terminates TLS and hands visitors to the deployments of providers that are connected to it.

use std::process::ExitCode;

use peer_gateway::command;

fn main() -> ExitCode {
    command::execute(std::env::args_os())
}
