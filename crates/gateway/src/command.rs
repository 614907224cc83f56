//! What `peergate` can be asked on the command line, and how it answers: texts for people, one JSON value with `--json`.
//! Failures are told as `peerctl` tells them: sentence and code on standard error, with `--json` also an object on
//! standard output.

use std::ffi::OsString;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;
use peer_net::PeerId;
use peer_proto::code::{Code, ExitStatus, Problem};
use peer_proto::id::Name;
use peer_proto::text::escape;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::gateway::{self, Denial, Gateway, InfoError, StartError};
use crate::providers::{self, ProvidersError, Reference};
use crate::settings::{self, Keys, Resolved, SettingsError};

/// Longest wait until the running gateway has put a denial into force.
const DENIAL_TIME: Duration = Duration::from_secs(3);

/// The public door of Peer Compute: HTTPS for visitors, tunnels to the providers that you allow.
#[derive(Debug, Parser)]
#[command(name = "peergate", version, propagate_version = true, disable_help_subcommand = true)]
struct Arguments {
    /// Settings file [default: DATA_DIR/peergate.toml]
    #[arg(long, env = "PEERGATE_CONFIG", global = true)]
    config: Option<PathBuf>,
    /// Answer with JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(flatten)]
    keys: Keys,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve (the default)
    Run,
    /// Let a provider publish deployments here; takes effect at once
    Allow {
        /// The provider's PeerId, from 'peerctl whoami' on its machine
        #[arg(value_parser = providers::parse_peer)]
        peer_id: PeerId,
        /// A name of your choice for it
        #[arg(long)]
        name: Option<Name>,
    },
    /// Stop letting a provider publish deployments here; its names end at once
    Deny {
        /// The provider's PeerId, or the name that it was given here
        #[arg(value_parser = providers::parse_reference)]
        provider: Reference,
    },
    /// List the providers that are allowed
    Providers,
    /// Show what providers and visitors need to know of this gateway
    Info,
    /// Look at the settings
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Show the version
    Version,
    /// Print the completion script for a shell
    Completion {
        /// The shell
        shell: Shell,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Check the settings and show each value with its origin
    Check,
}

/// What a command answers: lines for people, a value for programs.
struct Answer {
    text: String,
    value: Value,
}

impl Answer {
    fn new(lines: &[String], value: Value) -> Self {
        Self { text: lines.join("\n") + "\n", value }
    }
}

/// A failure as it leaves the program.
struct Failure(Problem);

impl Failure {
    fn new(code: Code, error: &dyn std::error::Error) -> Self {
        Self(Problem::new(code, error.to_string()))
    }
}

impl From<SettingsError> for Failure {
    fn from(error: SettingsError) -> Self {
        let code = match &error {
            SettingsError::File(_) => Code::FileFailed,
            SettingsError::Missing(_) | SettingsError::Syntax { .. } | SettingsError::Value { .. } => {
                Code::InvalidArgument
            }
        };
        Self::new(code, &error)
    }
}

impl From<ProvidersError> for Failure {
    fn from(error: ProvidersError) -> Self {
        let code = match &error {
            ProvidersError::File(_) | ProvidersError::Damaged { .. } => Code::FileFailed,
            ProvidersError::Full => Code::OverLimit,
            ProvidersError::Unknown(_) => Code::UnknownPeer,
            ProvidersError::Ambiguous(_) => Code::Ambiguous,
        };
        Self::new(code, &error)
    }
}

impl From<InfoError> for Failure {
    fn from(error: InfoError) -> Self {
        let code = match &error {
            InfoError::Absent(_) => Code::NoIdentity,
            InfoError::Identity(_) | InfoError::File(_) => Code::FileFailed,
        };
        Self::new(code, &error)
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        let code = match &error {
            StartError::Listen(_) | StartError::Network(_) => Code::InvalidArgument,
            _ => Code::FileFailed,
        };
        Self::new(code, &error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::new(Code::Internal, &error)
    }
}

/// Runs the program; the exit status follows the same table as `peerctl`'s.
pub fn execute(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let arguments = match Arguments::try_parse_from(&arguments) {
        Ok(arguments) => arguments,
        Err(error) => return refused_arguments(&error, arguments.iter().any(|argument| argument == "--json")),
    };
    let json = arguments.json;
    match dispatch(arguments) {
        Ok(answer) => {
            // A reader that has gone away wants no complaint.
            drop(print(&answer, json));
            ExitCode::SUCCESS
        }
        Err(Failure(problem)) => {
            complain(&format!("error: {}\ncode: {}", escape(&problem.message), problem.code));
            report(&problem, json)
        }
    }
}

/// Reports a command line that clap refused, or prints the help that it was asked for.
fn refused_arguments(error: &clap::Error, json: bool) -> ExitCode {
    drop(error.print());
    if !error.use_stderr() {
        return ExitCode::SUCCESS;
    }
    let rendered = error.render().to_string();
    let sentence = rendered.trim_start_matches("error: ").split("\n\n").next().unwrap_or_default();
    let sentence = sentence.split_whitespace().collect::<Vec<_>>().join(" ");
    let problem = Problem::new(Code::InvalidArgument, sentence);
    complain(&format!("code: {}", problem.code));
    report(&problem, json)
}

/// Tells programs of a problem, and gives the status to exit with.
fn report(problem: &Problem, json: bool) -> ExitCode {
    if json {
        drop(writeln!(io::stdout().lock(), "{}", json!({ "error": problem })));
    }
    let status = problem.code.exit_status();
    ExitCode::from(u8::try_from(status as i32).unwrap_or(ExitStatus::Failed as u8))
}

/// Writes to standard error; whoever closed it does not want to know.
fn complain(text: &str) {
    drop(writeln!(io::stderr().lock(), "{text}"));
}

fn print(answer: &Answer, json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        writeln!(out, "{}", answer.value)?;
    } else {
        out.write_all(answer.text.as_bytes())?;
    }
    out.flush()
}

fn dispatch(arguments: Arguments) -> Result<Answer, Failure> {
    let Arguments { config, json, keys, command } = arguments;
    match command.unwrap_or(Command::Run) {
        Command::Version => Ok(version()),
        Command::Completion { shell } => Ok(completion(shell)),
        command => {
            let resolved = settings::resolve(config.as_deref(), keys)?;
            let data_dir = &resolved.settings.data_dir;
            match command {
                Command::Allow { peer_id, name } => allow(data_dir, peer_id, name.as_ref()),
                Command::Deny { provider } => deny(data_dir, &provider),
                Command::Providers => list(data_dir),
                Command::Info => Ok(info(&gateway::info(&resolved.settings)?)),
                Command::Config { command: ConfigCommand::Check } => Ok(check(&resolved)),
                _ => run(&resolved, json),
            }
        }
    }
}

fn allow(data_dir: &Path, peer_id: PeerId, name: Option<&Name>) -> Result<Answer, Failure> {
    peer_state::data_dir::create_private(data_dir).map_err(ProvidersError::from)?;
    let changed = providers::allow(data_dir, peer_id, name.cloned())?;
    let text = if changed { "allowed" } else { "was allowed already:" };
    let value = json!({ "peer_id": peer_id.to_string(), "name": name, "changed": changed });
    Ok(Answer { text: format!("{text} {peer_id}\n"), value })
}

fn deny(data_dir: &Path, provider: &Reference) -> Result<Answer, Failure> {
    let peer_id = providers::deny(data_dir, provider)?;
    let denial = gateway::wait_until_denied(data_dir, peer_id, DENIAL_TIME).map_err(ProvidersError::from)?;
    let (text, in_force) = match denial {
        Denial::Done => ("; its names have ended", true),
        Denial::NotRunning => ("", true),
        Denial::Pending => ("; the running gateway has not ended its names yet, its log says why", false),
    };
    let value = json!({ "peer_id": peer_id.to_string(), "changed": true, "in_force": in_force });
    Ok(Answer { text: format!("denied {peer_id}{text}\n"), value })
}

fn version() -> Answer {
    let version = env!("CARGO_PKG_VERSION");
    Answer { text: format!("peergate {version}\n"), value: json!({ "name": "peergate", "version": version }) }
}

fn completion(shell: Shell) -> Answer {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "peergate", &mut script);
    let text = String::from_utf8_lossy(&script).into_owned();
    Answer { value: json!({ "shell": shell.to_string(), "script": text }), text }
}

fn list(data_dir: &Path) -> Result<Answer, Failure> {
    let providers = providers::load(data_dir)?.entries;
    let mut lines: Vec<String> = providers
        .iter()
        .map(|provider| format!("{}  {}", provider.peer_id, provider.name.as_ref().map_or("-", Name::as_str)))
        .collect();
    if providers.is_empty() {
        lines.push("no provider is allowed; add one with 'peergate allow PEERID'".to_owned());
    }
    Ok(Answer::new(&lines, json!(providers)))
}

fn info(info: &gateway::Info) -> Answer {
    let mut lines = vec![format!("peer id      {}", info.peer_id)];
    lines.extend(info.addresses.iter().map(|address| format!("providers    {address}")));
    if info.addresses.is_empty() {
        lines
            .push("providers    the addresses of this machine, which are shown here while the gateway runs".to_owned());
    }
    lines.push(format!("visitors     https://<name>{} (listens on {})", info.url_suffix, info.https_address));
    if let Some(path) = &info.ca_certificate {
        lines.push(format!("certificate  development authority {}", path.display()));
    }
    if let Some(address) = &info.metrics_address {
        lines.push(format!("metrics      http://{address}/metrics"));
    }
    lines.push(format!("state        {}", if info.running { "running" } else { "not running" }));
    Answer::new(&lines, json!(info))
}

fn check(resolved: &Resolved) -> Answer {
    let file = resolved.file.as_ref().map(|path| path.display().to_string());
    let mut lines = vec![format!("settings file: {}", file.as_deref().unwrap_or("none"))];
    lines.extend(resolved.explained.iter().map(|line| {
        let value = line.value.as_deref().unwrap_or("-");
        format!("{:32} {value:32} {}", line.key, line.origin)
    }));
    lines.push("the settings are valid".to_owned());
    Answer::new(&lines, json!({ "file": file, "settings": resolved.explained }))
}

fn run(resolved: &Resolved, json: bool) -> Result<Answer, Failure> {
    let filter = EnvFilter::try_from_env("PEERGATE_LOG").unwrap_or_else(|_| EnvFilter::new("info,libp2p_swarm=warn"));
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(colour).init();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let gateway = Gateway::start(&resolved.settings).await?;
        // Whoever started the program may have closed its output; the gateway runs nevertheless.
        drop(print(&info(gateway.info()), json));
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
        gateway.shutdown().await;
        Ok(Answer { text: "stopped\n".to_owned(), value: json!({ "stopped": true }) })
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use super::*;

    fn leaves(command: &clap::Command, path: &str, found: &mut Vec<String>) {
        let path = format!("{path} {}", command.get_name());
        let mut subcommands = command.get_subcommands().peekable();
        if subcommands.peek().is_none() {
            assert!(command.get_arguments().any(|argument| argument.get_id() == "json"), "{path} lacks --json");
            found.push(path);
        } else {
            subcommands.for_each(|subcommand| leaves(subcommand, &path, found));
        }
    }

    #[test]
    fn every_leaf_answers_json() {
        let mut command = Arguments::command();
        command.build();
        command.clone().debug_assert();
        let mut found = Vec::new();
        leaves(&command, "", &mut found);
        assert!(found.len() >= 8, "{found:?}");
    }

    #[test]
    fn wrong_arguments_are_refused() {
        for arguments in [
            &["peergate", "allow", "nobody"][..],
            &["peergate", "allow"],
            &["peergate", "--public-port", "70000"],
            &["peergate", "--listen", "10.0.0.1"],
            &["peergate", "--header-seconds", "0"],
        ] {
            assert!(Arguments::try_parse_from(arguments).is_err(), "{arguments:?}");
        }
        assert!(Arguments::try_parse_from(["peergate", "--domain", "a.b", "run", "--json"]).unwrap().json);
    }
}
