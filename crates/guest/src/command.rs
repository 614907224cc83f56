//! The command line: one word for what to do, and what that needs.

use std::{ffi::OsString, num::NonZeroU16, process::ExitCode, thread};

use crate::forward;

const USAGE: &str = "usage: peer-guest forward PORT | wait";

/// Exit code of a command line that means nothing.
const MISUSED: u8 = 2;

/// What the program is told to do.
#[derive(Debug, PartialEq, Eq)]
enum Task {
    /// Carry streams from standard input and output to this port of loopback.
    Forward(NonZeroU16),
    /// Do nothing until it is killed, so that its network can be tried.
    Wait,
}

fn parse(arguments: impl IntoIterator<Item = OsString>) -> Option<Task> {
    let words: Option<Vec<String>> = arguments.into_iter().map(|word| word.into_string().ok()).collect();
    match words?.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["forward", port] => port.parse().ok().map(Task::Forward),
        ["wait"] => Some(Task::Wait),
        _ => None,
    }
}

/// Does what the arguments say, and gives the program's exit code.
#[expect(clippy::print_stderr, reason = "a program tells its failures there")]
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let Some(task) = parse(arguments) else {
        eprintln!("{USAGE}");
        return ExitCode::from(MISUSED);
    };
    let done = match task {
        Task::Forward(port) => forward::run(port),
        Task::Wait => loop {
            thread::park();
        },
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("peer-guest: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(words: &[&str]) -> Option<Task> {
        parse(words.iter().map(OsString::from))
    }

    #[test]
    fn only_whole_and_sane_command_lines_are_taken() {
        assert_eq!(task(&["forward", "8080"]), NonZeroU16::new(8080).map(Task::Forward));
        assert_eq!(task(&["wait"]), Some(Task::Wait));
        for words in [
            &[][..],
            &["forward"],
            &["forward", "0"],
            &["forward", "65536"],
            &["forward", "80", "81"],
            &["wait", "1"],
            &["x"],
        ] {
            assert_eq!(task(words), None, "{words:?}");
        }
    }
}
