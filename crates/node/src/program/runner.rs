//! The runner: holds the engine's socket, and starts and ends the network process.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use peer_compute::engine::docker::DockerEngine;
use peer_compute::runner::channel::send_descriptor_blocking;
use peer_compute::runner::{Channel, server};
use peer_state::data_dir::DataDir;
use rustix::process::{Pid, Signal as Kill, kill_process};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;

use super::network::effective_capabilities;
use super::{END, NETWORK, UnixStream, Welcome, log, raise_file_limit, say};
use crate::api::socket;
use crate::daemon::DaemonError;
use crate::settings::{Account, Settings};

/// How long the processes of a daemon that was killed are given to be gone.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the network process is given to end in order.
const END_TIMEOUT: Duration = Duration::from_secs(40);
/// Threads of the runner: it waits for the engine most of the time.
const THREADS: usize = 2;
/// Entering a container's network namespace takes these two: `CAP_SYS_ADMIN` and `CAP_SYS_PTRACE`.
const ENTER: u64 = 1 << 21 | 1 << 19;
/// What the network process is told of the environment, in which it reads nothing itself: how failures are described, which
/// allocator or clock whoever started us has put under both processes, and that clock's settings.
const ENVIRONMENT: [&str; 7] = [
    "RUST_BACKTRACE",
    "RUST_LIB_BACKTRACE",
    "LD_PRELOAD",
    "FAKETIME_TIMESTAMP_FILE",
    "FAKETIME_NO_CACHE",
    "FAKETIME_DONT_FAKE_MONOTONIC",
    "NO_FAKE_STAT",
];

/// Serves until told to end, or until the network process ends.
pub(super) fn run(settings: &Settings) -> Result<ExitCode, DaemonError> {
    log(settings);
    raise_file_limit();
    let data_dir = DataDir::open_within(&settings.data_dir, PATIENCE)?;
    if let Some(user) = settings.user {
        data_dir.give(user.uid)?;
    }
    let listener = socket::bind(&settings.socket, settings.socket_owner)?;
    let (ours, theirs) = UnixStream::pair()?;
    let child = start(theirs, settings.user)?;
    welcome(&ours, settings)?;
    send_descriptor_blocking(&ours, data_dir.lock())?;
    send_descriptor_blocking(&ours, listener.as_fd())?;
    drop(listener);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_all().build()?;
    let status = runtime.block_on(serve(settings, ours, child));
    runtime.shutdown_background();
    drop(std::fs::remove_file(&settings.socket));
    Ok(exit_code(status?))
}

fn start(theirs: UnixStream, user: Option<Account>) -> io::Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("peerd").arg(NETWORK).stdin(Stdio::from(OwnedFd::from(theirs))).env_clear();
    command.envs(ENVIRONMENT.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
    if let Some(Account { uid, gid }) = user {
        // Of no other group: the engine's may be among those of whoever started us.
        command.uid(uid).gid(gid);
    }
    command.spawn()
}

fn welcome(ours: &UnixStream, settings: &Settings) -> io::Result<()> {
    let welcome = Welcome {
        settings: settings.resolved().to_vec(),
        file: settings.file.clone(),
        accept_empty_database: settings.accept_empty_database,
        enters_namespaces: effective_capabilities() & ENTER == ENTER,
    };
    let text = serde_json::to_vec(&welcome).map_err(io::Error::other)?;
    let length = u32::try_from(text.len()).map_err(io::Error::other)?;
    let mut ours = ours;
    ours.write_all(&length.to_be_bytes())?;
    ours.write_all(&text)
}

async fn serve(settings: &Settings, ours: UnixStream, mut child: Child) -> io::Result<ExitStatus> {
    let mut ends = [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?];
    let channel = Channel::new(ours)?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let mut ended = tokio::task::spawn_blocking(move || child.wait());
    let calls = carry_out(settings, &channel, pid);
    tokio::pin!(calls);
    tokio::select! {
        status = &mut ended => return status.map_err(io::Error::other)?,
        () = told(&mut ends) => {}
        () = &mut calls => {}
    }
    drop(channel.tell(END).await);
    // While it ends it may still need the engine.
    let in_order = async {
        tokio::select! {
            status = &mut ended => status.map_err(io::Error::other)?,
            () = &mut calls => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    };
    if let Ok(status) = timeout(END_TIMEOUT, in_order).await {
        return status;
    }
    tracing::warn!("the network process did not end in time and is killed");
    kill(pid);
    ended.await.map_err(io::Error::other)?
}

fn kill(pid: Option<Pid>) {
    if let Some(error) = pid.and_then(|pid| kill_process(pid, Kill::KILL).err()) {
        tracing::error!(%error, "the network process cannot be killed");
    }
}

/// Carries out calls for good: the end of the network process ends it all. One that does what it never does is killed.
async fn carry_out(settings: &Settings, channel: &Channel, pid: Option<Pid>) {
    if let Some(socket) = &settings.engine_socket {
        let engine = DockerEngine::new(socket)
            .with_runtime(settings.runtime.clone())
            .with_guest_program(&settings.guest_program);
        if let Err(error) = server::serve(engine, settings.wall.clone(), channel).await {
            tracing::error!(%error, "the network process does not keep to the protocol and is killed");
            kill(pid);
        }
    }
    std::future::pending::<()>().await;
}

async fn told(ends: &mut [Signal; 2]) {
    let [terminate, interrupt] = ends;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// A network process that crashed is a failure: whoever started the daemon starts both again.
fn exit_code(status: ExitStatus) -> ExitCode {
    if let Some(signal) = status.signal() {
        say(
            io::stderr(),
            &format!("peerd: the network process was ended by signal {signal}; containers go on running"),
        );
    }
    status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
}
