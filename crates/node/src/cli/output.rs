//! Everything that `peerctl` prints: results on standard output, the rest on standard error. No other file prints.
//!
//! With `--json`, standard output carries JSON and nothing else. Characters that could move a terminal's cursor or turn the
//! direction of its text never leave this file unescaped; inside JSON they are written as `\uXXXX`, which means the same.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

use clap::error::ErrorKind;
use peer_proto::code::{Code, ExitStatus, Problem};
use peer_proto::text::escape;
use serde::Serialize;

use super::failure::Failure;

/// Where results go, and in which form.
#[derive(Debug, Clone, Copy)]
pub(super) struct Output {
    json: bool,
    quiet: bool,
}

impl Output {
    /// Output as the global flags `--json` and `--quiet` want it.
    pub(super) fn new(json: bool, quiet: bool) -> Self {
        Self { json, quiet }
    }

    /// Whether standard output carries JSON.
    pub(super) fn is_json(self) -> bool {
        self.json
    }

    /// Whether remarks and progress are wanted.
    pub(super) fn is_quiet(self) -> bool {
        self.quiet
    }

    /// Prints a result: as one line of JSON, or as the text that `human` makes of it.
    pub(super) fn result<T: Serialize>(self, value: &T, human: impl FnOnce(&T) -> String) -> Result<(), Failure> {
        if self.json { text(&format!("{}\n", json_line(value)?)) } else { text(&human(value)) }
    }

    /// Prints a remark for people to standard error, unless `--quiet`.
    pub(super) fn note(self, text: &str) {
        if !self.quiet {
            complain(text);
        }
    }

    /// Reports how the command ended and gives the status to exit with.
    pub(super) fn conclude(self, outcome: Result<(), Failure>) -> u8 {
        match outcome {
            Ok(()) => ExitStatus::Success as u8,
            Err(failure) => {
                if let Failure::Problem(problem) = &failure {
                    self.problem(problem);
                }
                failure.exit_status()
            }
        }
    }

    /// Prints a problem: the sentence and the code on standard error, with `--json` also an object on standard output.
    pub(super) fn problem(self, problem: &Problem) {
        complain(&format!("error: {}\ncode: {}", escape(&problem.message), problem.code));
        if self.json
            && let Ok(line) = json_line(&serde_json::json!({ "error": problem }))
        {
            // Nothing is left to be done if even this cannot be written; the status says that it failed.
            drop(text(&format!("{line}\n")));
        }
    }

    /// Reports a command line that clap refused, or prints the help that it was asked for. Gives the exit status.
    pub(super) fn refused_arguments(self, error: &clap::Error) -> u8 {
        if !error.use_stderr() {
            drop(error.print());
            return ExitStatus::Success as u8;
        }
        let problem = Problem::new(Code::InvalidArgument, sentence_of(error));
        // Here the library's words list the hidden commands too.
        if error.kind() == ErrorKind::MissingSubcommand {
            complain(&format!("error: {}", problem.message));
        } else {
            drop(error.print());
        }
        complain(&format!("code: {}", problem.code));
        if self.json
            && let Ok(line) = json_line(&serde_json::json!({ "error": problem }))
        {
            drop(text(&format!("{line}\n")));
        }
        ExitStatus::Usage as u8
    }
}

/// What is wrong with a command line, in one line.
pub(super) fn sentence_of(error: &clap::Error) -> String {
    use ErrorKind::{DisplayHelpOnMissingArgumentOrSubcommand, MissingSubcommand};
    if matches!(error.kind(), MissingSubcommand | DisplayHelpOnMissingArgumentOrSubcommand) {
        return "a command is missing; --help lists the commands".to_owned();
    }
    let rendered = error.render().to_string();
    let sentence = rendered.trim_start_matches("error: ").split("\n\n").next().unwrap_or_default();
    sentence.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Prints help to whoever named no command. Gives the exit status.
pub(super) fn help(text: &str) -> u8 {
    complain(text.trim_end());
    ExitStatus::Usage as u8
}

/// Prints text as it is. Whatever of it comes from another machine must be escaped already.
pub(super) fn text(text: &str) -> Result<(), Failure> {
    write_all(&mut io::stdout().lock(), text)
}

/// Prints a piece of a container's output to the stream it was written to.
pub(super) fn container_output(stderr: bool, text: &str) -> Result<(), Failure> {
    if stderr { write_all(&mut io::stderr().lock(), text) } else { write_all(&mut io::stdout().lock(), text) }
}

/// Prints a warning to standard error, even with `--quiet`.
pub(super) fn warn(text: &str) {
    complain(&format!("warning: {text}"));
}

/// Whether standard output is a terminal, where control characters of remote text would act.
pub(super) fn stdout_is_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Whether standard error is a terminal.
pub(super) fn stderr_is_terminal() -> bool {
    io::stderr().is_terminal()
}

/// One line of JSON, safe on a terminal.
pub(super) fn json_line<T: Serialize>(value: &T) -> Result<String, Failure> {
    serde_json::to_string(value).map(|text| terminal_safe(&text)).map_err(|error| not_json(&error))
}

/// JSON over several lines, safe on a terminal.
pub(super) fn json_pretty<T: Serialize>(value: &T) -> Result<String, Failure> {
    serde_json::to_string_pretty(value).map(|text| terminal_safe(&text)).map_err(|error| not_json(&error))
}

fn not_json(error: &serde_json::Error) -> Failure {
    Failure::new(Code::Internal, format!("the result cannot be written as JSON: {error}"))
}

/// Replaces what a terminal would obey by its JSON escape. Outside of strings JSON holds only ASCII and line ends.
fn terminal_safe(json: &str) -> String {
    let mut safe = String::with_capacity(json.len());
    let mut buffer = [0; 4];
    for c in json.chars() {
        if c == '\n' || c.is_ascii_graphic() || c == ' ' || escape(c.encode_utf8(&mut buffer)).starts_with(c) {
            safe.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(safe, "\\u{unit:04x}").expect("writing to a string cannot fail");
            }
        }
    }
    safe
}

fn write_all(stream: &mut impl Write, text: &str) -> Result<(), Failure> {
    stream.write_all(text.as_bytes()).and_then(|()| stream.flush()).map_err(|error| Failure::output(&error))
}

/// Writes to standard error; whoever closed it does not want to know.
fn complain(text: &str) {
    drop(writeln!(io::stderr().lock(), "{text}"));
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use super::*;

    #[test]
    fn json_cannot_move_the_cursor_and_means_the_same() {
        let hostile = "a\u{1b}[2J\u{7f}\u{9b}\u{202e}b\nc 語";
        let line = json_line(&hostile).unwrap();
        assert_eq!(line, "\"a\\u001b[2J\\u007f\\u009b\\u202eb\\nc 語\"");
        assert_eq!(serde_json::from_str::<String>(&line).unwrap(), hostile);
    }
}
