//! The network process: everything that hears from other machines, without the engine and without rights.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use peer_compute::runner::Channel;
use peer_compute::runner::channel::receive_descriptor_blocking;
use peer_state::data_dir::DataDir;
use rustix::process::{Signal as DeathSignal, set_parent_process_death_signal};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{END, UnixStream, WELCOME_MAX, Welcome, failed, log, raise_file_limit};
use crate::api;
use crate::confinement::{self, Confinement};
use crate::daemon::{Daemon, DaemonError};
use crate::settings::{self, Settings};

/// Longest wait for what the program still does at its very end.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);

/// What the runner has handed over.
struct Given {
    settings: Settings,
    data_dir: DataDir,
    listener: UnixListener,
    channel: UnixStream,
    confinement: Confinement,
}

pub(super) fn main() -> ExitCode {
    match begin().and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

/// Takes what the runner hands over, and gives up everything that is not needed from there on: before the first thread,
/// and before a byte of anybody else is read.
fn begin() -> Result<Given, DaemonError> {
    // The runner cannot end without this process, nor this process go on without it.
    set_parent_process_death_signal(Some(DeathSignal::KILL)).map_err(io::Error::from)?;
    let channel = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let unexpected = |_| io::Error::other("peerd starts this process itself; start peerd without a command");
    let welcome = welcome(&channel).map_err(unexpected)?;
    let gone = || io::Error::from(io::ErrorKind::UnexpectedEof);
    let lock = receive_descriptor_blocking(&channel)?.ok_or_else(gone)?;
    let listener = UnixListener::from(receive_descriptor_blocking(&channel)?.ok_or_else(gone)?);
    let settings = settings::restore(welcome.settings, welcome.file, welcome.accept_empty_database)
        .map_err(|errors| io::Error::other(errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")))?;
    let data_dir = DataDir::with_lock(&settings.data_dir, lock);
    log(&settings);
    raise_file_limit();
    let confinement = confinement::confine(&settings, welcome.enters_namespaces)?;
    Ok(Given { settings, data_dir, listener, channel, confinement })
}

fn welcome(channel: &UnixStream) -> io::Result<Welcome> {
    let mut channel = channel;
    let mut length = [0; 4];
    channel.read_exact(&mut length)?;
    let length = u64::from(u32::from_be_bytes(length));
    let mut text = Vec::new();
    channel.take(length.min(WELCOME_MAX)).read_to_end(&mut text)?;
    serde_json::from_slice(&text).map_err(io::Error::other)
}

fn run(given: Given) -> Result<(), DaemonError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(serve(given));
    runtime.shutdown_timeout(LEAVE_TIMEOUT);
    result
}

async fn serve(given: Given) -> Result<(), DaemonError> {
    // Caught from the beginning: a signal during the start ends the program in order too.
    let mut ends = [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?];
    tracing::debug!(confinement = ?given.confinement, "the network process is confined");
    let channel = Arc::new(Channel::new(given.channel)?);
    let runner = given.settings.engine_socket.is_some().then(|| channel.clone());
    let daemon = Daemon::open_with(given.settings, given.data_dir, runner, Some(given.confinement)).await?;
    let api = match api::serve_on(&daemon, given.listener).await {
        Ok(api) => api,
        Err(error) => {
            daemon.shutdown().await;
            return Err(error.into());
        }
    };
    match daemon.node().await {
        Ok(node) => {
            tracing::info!(peer = %node.identity.key.peer_id(), socket = %daemon.settings.socket.display(), "peerd serves");
        }
        Err(problem) => tracing::info!(socket = %daemon.settings.socket.display(), %problem, "peerd serves"),
    }
    ended(&mut ends, &channel).await;
    tracing::info!("peerd ends; containers go on running");
    api.shutdown().await;
    daemon.shutdown().await;
    Ok(())
}

async fn ended(ends: &mut [Signal; 2], channel: &Channel) {
    let [terminate, interrupt] = ends;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        told = channel.told() => {
            if !matches!(told, Ok(Some(END))) {
                tracing::error!("the runner process is gone");
            }
        }
    }
}

/// Whether this process may do what only the runner should: told by the kernel.
pub(super) fn effective_capabilities() -> u64 {
    let mut status = String::new();
    let read = File::open("/proc/self/status").and_then(|mut file| file.read_to_string(&mut status));
    let digits = status.lines().find_map(|line| line.strip_prefix("CapEff:")).filter(|_| read.is_ok());
    digits.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok()).unwrap_or(0)
}
