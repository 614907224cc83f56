//! The only way to a container's port: from inside its network namespace, which has no other way out or in.
//!
//! Entering a namespace changes a thread for good, so each connection is made by a thread of its own, which ends with
//! it. The socket stays in the namespace where it was made. A [`Namespace`] keeps its namespace alive: drop it when the
//! container has ended.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddr, TcpStream as BlockingStream},
    os::{fd::AsFd, unix::fs::MetadataExt},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use peer_proto::{
    code::{Code, Problem},
    unit::Port,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::timeout,
};

use crate::engine::{ContainerId, Engine, EngineError};

/// Opens network namespaces, and bounds how many threads are inside one at a time.
#[derive(Debug, Clone)]
pub struct Connector {
    threads: Arc<Semaphore>,
}

/// The network namespace of one container's present run.
#[derive(Debug, Clone)]
pub struct Namespace {
    link: Arc<File>,
    threads: Arc<Semaphore>,
}

/// Why a container's port could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// It does not run, or its run ended meanwhile.
    #[error("the container does not run")]
    NotRunning,
    /// This process may not enter network namespaces.
    #[error("entering the container's network needs root (CAP_SYS_ADMIN): run the daemon as root")]
    NotPermitted,
    /// The container shares the host's network, which no container of ours does.
    #[error("the container shares the host's network; it must be removed")]
    HostNetwork,
    /// Nothing listens there.
    #[error(
        "nothing listens on port {port} of the container; see whether its program has started and which port it uses"
    )]
    Closed {
        /// The port.
        port: Port,
    },
    /// It took too long, or too many others were waiting.
    #[error("port {port} of the container did not answer in time")]
    TimedOut {
        /// The port.
        port: Port,
    },
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The system failed.
    #[error("the container's network cannot be entered: {0}")]
    System(#[source] io::Error),
}

impl ConnectError {
    /// The stable code.
    pub fn code(&self) -> Code {
        match self {
            Self::NotRunning => Code::WrongState,
            Self::HostNetwork => Code::IsolationViolated,
            Self::Closed { .. } => Code::PortClosed,
            Self::TimedOut { .. } => Code::Timeout,
            Self::Engine(error) => error.code(),
            Self::NotPermitted | Self::System(_) => Code::Internal,
        }
    }

    /// Code and sentence.
    pub fn problem(&self) -> Problem {
        Problem::new(self.code(), self.to_string())
    }
}

impl Connector {
    /// At most so many threads at a time.
    pub fn new(threads: usize) -> Self {
        Self { threads: Arc::new(Semaphore::new(threads)) }
    }

    /// Opens the network namespace of a running container.
    pub async fn open(&self, engine: &impl Engine, container: &ContainerId) -> Result<Namespace, ConnectError> {
        let run = |facts: Option<crate::engine::ContainerFacts>| {
            facts.and_then(|facts| Some((facts.pid?, facts.started_at))).ok_or(ConnectError::NotRunning)
        };
        let before = run(engine.inspect(container.as_str()).await?)?;
        let link = File::open(format!("/proc/{}/ns/net", before.0)).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => ConnectError::NotRunning,
            io::ErrorKind::PermissionDenied => ConnectError::NotPermitted,
            _ => ConnectError::System(error),
        })?;
        // The number may have passed to another process before the file was open: it has not if the run is the same.
        if run(engine.inspect(container.as_str()).await?)? != before {
            return Err(ConnectError::NotRunning);
        }
        let (own, its) = (std::fs::metadata("/proc/self/ns/net"), link.metadata());
        let (own, its) = (own.map_err(ConnectError::System)?, its.map_err(ConnectError::System)?);
        if (own.dev(), own.ino()) == (its.dev(), its.ino()) {
            return Err(ConnectError::HostNetwork);
        }
        Ok(Namespace { link: Arc::new(link), threads: self.threads.clone() })
    }
}

impl Namespace {
    /// Connects to the port on the container's loopback address.
    pub async fn connect(&self, port: Port, within: Duration) -> Result<TcpStream, ConnectError> {
        let deadline = Instant::now() + within;
        let timed_out = || ConnectError::TimedOut { port };
        let permit = timeout(within, self.threads.clone().acquire_owned()).await.map_err(|_| timed_out())?;
        let permit = permit.map_err(|_| timed_out())?;
        let (sender, receiver) = oneshot::channel();
        let link = self.link.clone();
        let enter = move || drop(sender.send(connect_inside(&link, port, deadline, permit)));
        thread::Builder::new().name("namespace".into()).spawn(enter).map_err(ConnectError::System)?;
        let rest = deadline.saturating_duration_since(Instant::now()) + Duration::from_secs(1);
        let connected = timeout(rest, receiver).await.map_err(|_| timed_out())?;
        let stream = connected.map_err(|_| ConnectError::System(io::Error::other("the thread ended early")))??;
        TcpStream::from_std(stream).map_err(ConnectError::System)
    }
}

/// Runs on a thread of its own, which is of no use for anything else afterwards.
fn connect_inside(
    link: &File,
    port: Port,
    deadline: Instant,
    permit: OwnedSemaphorePermit,
) -> Result<BlockingStream, ConnectError> {
    move_into_link_name_space(link.as_fd(), Some(LinkNameSpaceType::Network)).map_err(|error| {
        if error == rustix::io::Errno::PERM { ConnectError::NotPermitted } else { ConnectError::System(error.into()) }
    })?;
    let rest = deadline.saturating_duration_since(Instant::now());
    if rest.is_zero() {
        return Err(ConnectError::TimedOut { port });
    }
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port.get()));
    let stream = BlockingStream::connect_timeout(&address, rest).map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionRefused => ConnectError::Closed { port },
        io::ErrorKind::TimedOut => ConnectError::TimedOut { port },
        _ => ConnectError::System(error),
    })?;
    // Small writes must not wait for the other side's delayed acknowledgements.
    stream.set_nodelay(true).map_err(ConnectError::System)?;
    stream.set_nonblocking(true).map_err(ConnectError::System)?;
    drop(permit);
    Ok(stream)
}
