//! The daemon: everything is in [`peer_node::program`].

use std::process::ExitCode;

fn main() -> ExitCode {
    peer_node::program::main()
}
