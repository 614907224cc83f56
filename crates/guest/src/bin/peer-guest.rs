//! See the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    peer_guest::command::run(std::env::args_os().skip(1))
}
