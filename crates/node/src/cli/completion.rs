//! `completion`, and the hidden `markdown` that prints docs/cli.md. Both are made from the grammar.

use std::fmt::Write as _;

use clap::{Args, Command};
use clap_complete::Shell;
use peer_proto::code::{Code, ExitStatus};
use serde::Serialize;

use super::failure::{Failure, INTERRUPTED};
use super::{GLOBAL_HEADING, REFERENCE_WIDTH, Session, grammar};

/// Print the completion script of a shell
///
/// Example: peerctl completion bash > /etc/bash_completion.d/peerctl
#[derive(Debug, Args)]
pub(super) struct CompletionArguments {
    /// The shell
    shell: Shell,
}

/// Print the reference of all commands
#[derive(Debug, Args)]
#[command(hide = true)]
pub(super) struct MarkdownArguments {}

/// What `completion --json` prints.
#[derive(Debug, Serialize)]
struct Text {
    text: String,
}

/// What `markdown --json` prints.
#[derive(Debug, Serialize)]
struct Reference {
    text: String,
    /// Every command that can be run, without the hidden ones.
    commands: Vec<String>,
}

/// Runs `completion`.
pub(super) fn completion(session: &Session, arguments: &CompletionArguments) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut grammar(), "peerctl", &mut script);
    let text = String::from_utf8_lossy(&script).into_owned();
    session.output.result(&Text { text }, |script| script.text.clone())
}

/// Runs `markdown`.
pub(super) fn markdown(session: &Session, MarkdownArguments {}: &MarkdownArguments) -> Result<(), Failure> {
    let shown = leaves().into_iter().filter(|(_, command)| !command.is_hide_set());
    let reference = Reference { text: reference(), commands: shown.map(|(path, _)| path).collect() };
    session.output.result(&reference, |reference| reference.text.clone())
}

/// Every command that can be run, with its words.
pub(super) fn leaves() -> Vec<(String, Command)> {
    let mut grammar = grammar();
    grammar.build();
    let mut leaves = Vec::new();
    collect_leaves(&grammar, "", &mut leaves);
    leaves
}

fn collect_leaves(command: &Command, path: &str, leaves: &mut Vec<(String, Command)>) {
    let mut inner = command.get_subcommands().filter(|inner| inner.get_name() != "help").peekable();
    let runs_itself = !command.is_subcommand_required_set();
    if inner.peek().is_none() || (runs_itself && !path.is_empty()) {
        leaves.push((path.to_owned(), command.clone()));
    }
    for one in inner {
        collect_leaves(one, format!("{path} {}", one.get_name()).trim_start(), leaves);
    }
}

const INTRODUCTION: &str = "\
# peerctl

<!-- Generated: target/release/peerctl markdown > docs/cli.md -->

With `--json`, a command prints one JSON object or list on standard output, and nothing else there; commands that go on
(`logs`, `events`, `stats`) or that take several deployments (`stop`, `start`, `restart`, `rm`) print one object a line. A
failure prints `{\"error\": {\"code\": …, \"message\": …}}`. Names of fields and codes are stable. Moments are milliseconds
since 1970 (UTC), sizes are bytes, processors are thousandths of one.

Remarks and progress go to standard error; bars are drawn only on a terminal, and nothing is coloured but the help, which
`NO_COLOR` keeps plain. `PEER_SOCKET` names the daemon's socket as `--socket` does.
";

/// The whole of docs/cli.md.
fn reference() -> String {
    let mut grammar = grammar().term_width(REFERENCE_WIDTH).max_term_width(REFERENCE_WIDTH);
    grammar.build();
    let mut text = INTRODUCTION.to_owned();
    text.push_str("\n## Commands\n");
    describe(&mut grammar, "peerctl", &mut text);
    text.push_str("\n## Exit statuses and codes\n\n| Status | Meaning | Codes |\n|---|---|---|\n");
    for status in STATUSES {
        let codes = Code::ALL.iter().filter(|code| code.exit_status() == status);
        let codes: Vec<String> = codes.map(|code| format!("`{code}`")).collect();
        writeln!(text, "| {} | {} | {} |", status as u8, meaning(status), codes.join(" "))
            .expect("writing to a string");
    }
    writeln!(text, "| {INTERRUPTED} | Ended by Ctrl-C | |").expect("writing to a string");
    text
}

fn describe(command: &mut Command, path: &str, text: &mut String) {
    // The flags of every command are told once, at the top.
    let is_top = path == "peerctl";
    let shown = command.clone().term_width(REFERENCE_WIDTH);
    let mut shown = shown.mut_args(|argument| {
        let global = argument.get_help_heading() == Some(GLOBAL_HEADING) || argument.get_id() == "help";
        let hidden = !is_top && global;
        argument.hide(hidden)
    });
    let help = shown.render_long_help().to_string();
    let help = help.lines().map(str::trim_end).collect::<Vec<_>>().join("\n");
    write!(text, "\n### {path}\n\n```text\n{}\n```\n", help.trim()).expect("writing to a string");
    for inner in command.get_subcommands_mut().filter(|inner| !inner.is_hide_set() && inner.get_name() != "help") {
        let path = format!("{path} {}", inner.get_name());
        describe(inner, &path, text);
    }
}

const STATUSES: [ExitStatus; 8] = [
    ExitStatus::Success,
    ExitStatus::Failed,
    ExitStatus::Usage,
    ExitStatus::NotFound,
    ExitStatus::Refused,
    ExitStatus::Unavailable,
    ExitStatus::Busy,
    ExitStatus::NotReady,
];

fn meaning(status: ExitStatus) -> &'static str {
    match status {
        ExitStatus::Success => "Done",
        ExitStatus::Failed => "Failed while doing it",
        ExitStatus::Usage => "The command line is wrong",
        ExitStatus::NotFound => "There is no such thing",
        ExitStatus::Refused => "Refused: by a grant, a limit, a signature or a state",
        ExitStatus::Unavailable => "Somebody else does not answer",
        ExitStatus::Busy => "No room now; later perhaps",
        ExitStatus::NotReady => "Something must be set up first",
    }
}
