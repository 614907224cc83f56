//! The daemon: everything is in [`peer_node::daemon`].

use std::process::ExitCode;

fn main() -> ExitCode {
    peer_node::daemon::main()
}
