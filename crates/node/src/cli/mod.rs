//! The command line `peerctl`: grammar here and in one file for each group of commands; `output` alone prints.
//!
//! It holds no key and no state. Flags are parsed once, into the types of the local interface; everything else is the
//! daemon's, which `client` asks.

mod client;
mod completion;
mod daemon;
mod deploy;
mod deployments;
mod emergency;
mod environment;
mod events;
mod failure;
mod forward;
mod gateways;
mod grants;
mod identity;
mod image;
mod images;
mod invitations;
mod lifecycle;
mod limits;
mod logs;
mod moment;
mod output;
mod passphrase;
mod pause;
mod peers;
mod rotation;
mod seal;
mod stats;
mod table;
mod transfer;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand};
use peer_proto::code::Code;

use client::Client;
use failure::Failure;
use output::Output;

/// Heading of the flags that every command has.
const GLOBAL_HEADING: &str = "Options of every command";
/// Width of the generated reference (columns); people's help is as wide as their terminal.
const REFERENCE_WIDTH: usize = 100;
/// Longest wait at the end for a thread that still reads a file or standard input.
const LEAVE_DEADLINE: Duration = Duration::from_millis(200);

/// Run containers on your friends' machines, and let them run theirs on yours.
///
/// peerctl speaks to the daemon of this machine, peerd. Wherever a peer or a deployment is named, its name is accepted, its
/// id, or at least four characters of the id if no other begins so.
#[derive(Debug, Parser)]
#[command(name = "peerctl", version, propagate_version = false, max_term_width = REFERENCE_WIDTH)]
struct Arguments {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Flags of every command.
#[derive(Debug, Args)]
struct Global {
    /// Socket of the daemon [default: peer-compute/peerd.sock in $XDG_RUNTIME_DIR if it is there, else in /run]
    #[arg(long, global = true, help_heading = GLOBAL_HEADING, value_name = "PATH", env = "PEER_SOCKET", hide_env_values = true)]
    socket: Option<PathBuf>,
    /// Print JSON on standard output, and nothing else there
    #[arg(long, global = true, help_heading = GLOBAL_HEADING)]
    json: bool,
    /// Print no remarks and no progress
    #[arg(long, global = true, help_heading = GLOBAL_HEADING)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    Init(identity::InitArguments),
    Whoami(identity::WhoamiArguments),
    /// The key of this machine: its passphrase, its successor, its end
    #[command(subcommand)]
    Identity(identity::IdentityCommand),
    /// The peers that this machine trusts
    #[command(subcommand)]
    Peers(peers::PeersCommand),
    Invite(invitations::InviteArguments),
    Join(invitations::JoinArguments),
    /// The gateways that give this machine's deployments a public address
    #[command(subcommand)]
    Gateway(gateways::GatewayCommand),
    Deploy(Box<deploy::DeployArguments>),
    Push(images::PushArguments),
    Images(images::ImagesArguments),
    Ps(deployments::PsArguments),
    Status(deployments::StatusArguments),
    Inspect(deployments::InspectArguments),
    Logs(logs::LogsArguments),
    Stop(lifecycle::StopArguments),
    Start(lifecycle::StartArguments),
    Restart(lifecycle::RestartArguments),
    Rm(lifecycle::RmArguments),
    Limits(limits::LimitsArguments),
    Pause(pause::PauseArguments),
    Resume(pause::ResumeArguments),
    Panic(emergency::PanicArguments),
    Events(events::EventsArguments),
    Stats(stats::StatsArguments),
    PortForward(forward::PortForwardArguments),
    Doctor(daemon::DoctorArguments),
    Audit(daemon::AuditArguments),
    /// The daemon's configuration
    #[command(subcommand)]
    Config(daemon::ConfigCommand),
    Version(daemon::VersionArguments),
    Completion(completion::CompletionArguments),
    Markdown(completion::MarkdownArguments),
}

/// What every command works with.
#[derive(Debug)]
struct Session {
    client: Client,
    output: Output,
}

/// Runs one command line to its end and gives the status to exit with.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if arguments.len() <= 1 {
        return output::help(&grammar().max_term_width(REFERENCE_WIDTH).render_help().to_string());
    }
    let parsed = match Arguments::try_parse_from(&arguments) {
        Ok(parsed) => parsed,
        Err(error) => {
            let json = arguments.iter().take_while(|argument| *argument != "--").any(|argument| argument == "--json");
            return Output::new(json, false).refused_arguments(&error);
        }
    };
    let output = Output::new(parsed.global.json, parsed.global.quiet);
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let failure = Failure::new(Code::Internal, format!("the runtime cannot be started: {error}"));
            return output.conclude(Err(failure));
        }
    };
    let socket = parsed.global.socket.unwrap_or_else(default_socket);
    let session = Session { client: Client::new(socket), output };
    let outcome = runtime.block_on(until_interrupted(parsed.command, &session));
    runtime.shutdown_timeout(LEAVE_DEADLINE);
    output.conclude(outcome)
}

/// Runs a command until it ends or Ctrl-C ends it.
async fn until_interrupted(command: Command, session: &Session) -> Result<(), Failure> {
    let goes_on = matches!(command, Command::Deploy(_) | Command::Restart(_) | Command::Start(_) | Command::Stop(_));
    tokio::select! {
        outcome = dispatch(command, session) => outcome,
        signal = tokio::signal::ctrl_c() => match signal {
            Ok(()) => {
                if goes_on {
                    session.output.note("What the peer has accepted goes on without this command: see `peerctl ps`.");
                }
                Err(Failure::Interrupted)
            }
            Err(error) => Err(Failure::new(Code::Internal, format!("signals cannot be received: {error}"))),
        },
    }
}

async fn dispatch(command: Command, session: &Session) -> Result<(), Failure> {
    match command {
        Command::Init(arguments) => identity::init(session, arguments).await,
        Command::Whoami(arguments) => identity::whoami(session, &arguments).await,
        Command::Identity(command) => identity::run(session, command).await,
        Command::Peers(command) => peers::run(session, command).await,
        Command::Invite(arguments) => invitations::invite(session, arguments).await,
        Command::Join(arguments) => invitations::join(session, arguments).await,
        Command::Gateway(command) => gateways::run(session, command).await,
        Command::Deploy(arguments) => deploy::run(session, *arguments).await,
        Command::Push(arguments) => images::push(session, arguments).await,
        Command::Images(arguments) => images::list(session, &arguments).await,
        Command::Ps(arguments) => deployments::ps(session, &arguments).await,
        Command::Status(arguments) => deployments::status(session, &arguments).await,
        Command::Inspect(arguments) => deployments::inspect(session, &arguments).await,
        Command::Logs(arguments) => logs::run(session, &arguments).await,
        Command::Stop(arguments) => lifecycle::stop(session, arguments).await,
        Command::Start(arguments) => lifecycle::start(session, arguments).await,
        Command::Restart(arguments) => lifecycle::restart(session, arguments).await,
        Command::Rm(arguments) => lifecycle::rm(session, arguments).await,
        Command::Limits(arguments) => limits::run(session, arguments).await,
        Command::Pause(arguments) => pause::pause(session, arguments).await,
        Command::Resume(arguments) => pause::resume(session, arguments).await,
        Command::Panic(arguments) => emergency::panic(session, &arguments).await,
        Command::Events(arguments) => events::run(session, &arguments).await,
        Command::Stats(arguments) => stats::run(session, &arguments).await,
        Command::PortForward(arguments) => forward::run(session, &arguments).await,
        Command::Doctor(arguments) => daemon::doctor(session, &arguments).await,
        Command::Audit(arguments) => daemon::audit(session, &arguments).await,
        Command::Config(command) => daemon::config(session, &command).await,
        Command::Version(arguments) => daemon::version(session, &arguments).await,
        Command::Completion(arguments) => completion::completion(session, &arguments),
        Command::Markdown(arguments) => completion::markdown(session, &arguments),
    }
}

fn default_socket() -> PathBuf {
    let in_runtime_directory = std::env::var_os("XDG_RUNTIME_DIR")
        .filter(|directory| !directory.is_empty())
        .map(|directory| PathBuf::from(directory).join("peer-compute/peerd.sock"))
        .filter(|socket| socket.exists());
    in_runtime_directory.unwrap_or_else(|| PathBuf::from("/run/peer-compute/peerd.sock"))
}

/// The whole grammar.
fn grammar() -> clap::Command {
    Arguments::command()
}

/// Reads a name or the beginning of an id; which thing it means, the daemon knows.
fn parse_reference(text: &str) -> Result<String, String> {
    let valid = (1..=128).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
    if valid { Ok(text.to_owned()) } else { Err("a name or an id has 1 to 128 characters and no space".to_owned()) }
}

/// Reads `argument`, or standard input if it is `-`: secrets need not be seen in a list of processes.
async fn argument_or_stdin(argument: String, what: &str) -> Result<String, Failure> {
    const LENGTH_MAX: u64 = 64 * 1024;
    if argument != "-" {
        return Ok(argument.trim().to_owned());
    }
    let read = tokio::task::spawn_blocking(|| {
        let mut text = String::new();
        std::io::Read::read_to_string(&mut std::io::Read::take(std::io::stdin(), LENGTH_MAX), &mut text).map(|_| text)
    });
    let text = read.await.map_err(|error| Failure::new(Code::Internal, error.to_string()))?;
    let text = text
        .map_err(|error| Failure::new(Code::FileFailed, format!("cannot read {what} from standard input: {error}")))?;
    match text.trim() {
        "" => Err(Failure::argument(format!("standard input holds no {what}"))),
        text => Ok(text.to_owned()),
    }
}

#[cfg(test)]
mod tests;
