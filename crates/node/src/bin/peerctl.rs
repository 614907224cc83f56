//! The command line of Peer Compute.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(peer_node::cli::run(std::env::args_os()))
}
