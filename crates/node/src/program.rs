//! `peerd` as a program: what is asked of it, and the two processes that serve (SECURITY M22).
//!
//! The process that is started is the *runner*: it holds the engine's socket and speaks with nobody else. It starts itself
//! again as the *network process*, which does everything else and first gives up every right that it does not need. Both
//! end together.

mod network;
mod runner;

use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use rustix::process::{Resource, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};

use crate::daemon::DaemonError;
use crate::settings::{self, Invocation, LogFormat, Resolved, SettingError, Settings, Task};

/// Exit status for a wrong command line or configuration.
const USAGE: u8 = 2;
/// Files that may be open at one time.
const FILES_MAX: u64 = 4096;
/// The only argument of the network process; nobody else says it.
const NETWORK: &str = "network-process";
/// Longest message with which the runner begins (bytes).
const WELCOME_MAX: u64 = 1 << 20;
/// What the runner says when the network process is to end in order.
const END: u8 = b'E';

/// How the runner begins. The lock of the data directory and the socket of the local interface follow.
#[derive(Debug, Serialize, Deserialize)]
struct Welcome {
    settings: Vec<Resolved>,
    /// The configuration file, if there was one.
    file: Option<PathBuf>,
    accept_empty_database: bool,
    /// Whether the runner may enter containers' network namespaces.
    enters_namespaces: bool,
}

/// The whole program `peerd`.
pub fn main() -> ExitCode {
    if std::env::args_os().skip(1).eq([OsStr::new(NETWORK)]) {
        return network::main();
    }
    let environment = |name: &str| std::env::var(name).ok();
    let invocation = match settings::parse(std::env::args_os(), &environment) {
        Ok(invocation) => invocation,
        Err(settings::UsageError(error)) => {
            drop(error.print());
            return ExitCode::from(if error.use_stderr() { USAGE } else { 0 });
        }
    };
    match invocation {
        Invocation { task: Task::CheckConfiguration { json }, settings } => check(json, &settings),
        Invocation { task: Task::Run, settings: Ok(settings) } => {
            runner::run(&settings).unwrap_or_else(|error| failed(&error))
        }
        Invocation { task: Task::Run, settings: Err(errors) } => complain(&errors),
    }
}

fn failed(error: &DaemonError) -> ExitCode {
    say(io::stderr(), &format!("peerd: {error}"));
    ExitCode::FAILURE
}

/// Writes a line; a reader that is gone is no failure of ours.
fn say(mut to: impl Write, line: &str) {
    drop(writeln!(to, "{line}"));
}

fn complain(errors: &[SettingError]) -> ExitCode {
    for error in errors {
        say(io::stderr(), &format!("peerd: {error}"));
    }
    ExitCode::from(USAGE)
}

fn check(json: bool, settings: &Result<Settings, Vec<SettingError>>) -> ExitCode {
    match settings {
        Ok(settings) if json => {
            say(io::stdout(), &serde_json::to_string_pretty(settings.explain()).expect("texts are always JSON"));
            ExitCode::SUCCESS
        }
        Ok(settings) => {
            let width = settings.explain().iter().map(|setting| setting.key.len()).max().unwrap_or(0);
            for setting in settings.explain() {
                say(io::stdout(), &format!("{:width$}  {}  ({})", setting.key, setting.value, setting.source));
            }
            ExitCode::SUCCESS
        }
        Err(errors) if json => {
            let errors: Vec<_> = errors.iter().map(ToString::to_string).collect();
            say(io::stdout(), &serde_json::json!({ "errors": errors }).to_string());
            ExitCode::from(USAGE)
        }
        Err(errors) => complain(errors),
    }
}

/// Connections, visits and containers take file descriptors; the usual limit of 1,024 is soon reached.
fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(FILES_MAX, |maximum| maximum.min(FILES_MAX));
    if limit.current.is_some_and(|current| current < wanted) {
        limit.current = Some(wanted);
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::warn!(%error, "the limit of open files could not be raised");
        }
    }
}

fn log(settings: &Settings) {
    let filter = tracing_subscriber::EnvFilter::new(&settings.log);
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let set = match settings.log_format {
        LogFormat::Text => builder.with_ansi(rustix::termios::isatty(io::stderr())).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    if let Err(error) = set {
        say(io::stderr(), &format!("peerd: the log cannot be set up: {error}"));
    }
}
