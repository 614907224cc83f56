//! The only way to a container's port: from inside its network namespace, which has no other way out or in. Where the
//! daemon may not enter it, a [`Forwarder`] does in its place.
//!
//! Entering a namespace changes a thread for good, so each connection is made by a thread of its own, which ends with
//! it. The socket stays in the namespace where it was made. A [`Namespace`] keeps its namespace alive: drop it when the
//! container has ended.

mod forwarder;
mod network;

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream as BlockingStream, UdpSocket},
    os::{fd::AsFd, unix::fs::MetadataExt},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use peer_proto::{
    code::{Code, Problem},
    unit::Port,
};
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, connect as connect_socket, socket_with},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use tokio::{
    net::TcpStream,
    sync::{Semaphore, oneshot},
    time::timeout,
};

use crate::{
    engine::{ContainerId, Engine, EngineError, Target},
    usage::ControlGroup,
};

pub use forwarder::Forwarder;
pub(crate) use forwarder::Progress;
pub use network::{Connection, Network};

/// How long it may take to enter a namespace and do nothing there.
const ENTERING: Duration = Duration::from_secs(5);

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
    #[error(
        "the daemon may not enter the container's network and has no program to put into it; install peer-guest beside \
         peerd, or run peerd as root"
    )]
    NotPermitted,
    /// The engine's containers are no processes of this machine: it runs them in a machine of its own.
    #[error(
        "the container runs where the daemon cannot enter its network, and there is no program to put into it; install \
         peer-guest beside peerd"
    )]
    Elsewhere,
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
            Self::NotPermitted | Self::Elsewhere | Self::System(_) => Code::Internal,
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
        let opened = open_link(before.0, container);
        // The number may have passed to another process before the file was open: it has not if the run is the same.
        if run(engine.inspect(container.as_str()).await?)? != before {
            return Err(ConnectError::NotRunning);
        }
        let link = opened?;
        let (own, its) = (std::fs::metadata("/proc/self/ns/net"), link.metadata());
        let (own, its) = (own.map_err(ConnectError::System)?, its.map_err(ConnectError::System)?);
        if (own.dev(), own.ino()) == (its.dev(), its.ino()) {
            return Err(ConnectError::HostNetwork);
        }
        let namespace = Namespace { link: Arc::new(link), threads: self.threads.clone() };
        namespace.try_entering().await?;
        Ok(namespace)
    }
}

/// Opens the network namespace of a process, which must be the container's: where the engine runs in a machine of its own,
/// the number means nothing or somebody else here.
fn open_link(process: u32, container: &ContainerId) -> Result<File, ConnectError> {
    ControlGroup::find(process, container).map_err(|_| ConnectError::Elsewhere)?;
    File::open(format!("/proc/{process}/ns/net")).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => ConnectError::NotRunning,
        io::ErrorKind::PermissionDenied => ConnectError::NotPermitted,
        _ => ConnectError::System(error),
    })
}

impl Namespace {
    /// Connects to the port on the container's loopback address.
    pub async fn connect(&self, port: Port, within: Duration) -> Result<TcpStream, ConnectError> {
        let deadline = Instant::now() + within;
        let timed_out = || ConnectError::TimedOut { port };
        let stream = self.inside(within, move || connect_loopback(port, deadline)).await;
        TcpStream::from_std(stream.ok_or_else(timed_out)??).map_err(ConnectError::System)
    }

    /// Tries from inside which of these answer within a time.
    pub async fn reach(&self, targets: &[Target], within: Duration) -> Result<Vec<bool>, ConnectError> {
        let begun: Vec<_> = targets.to_vec();
        let begin = move || Ok(begun.into_iter().map(Attempt::begin).collect::<Vec<_>>());
        let timed_out = || ConnectError::System(io::ErrorKind::TimedOut.into());
        let attempts = self.inside(within, begin).await.ok_or_else(timed_out)??;
        let ends = attempts
            .into_iter()
            .map(|attempt| async move { matches!(timeout(within, attempt.succeeds()).await, Ok(Ok(true))) });
        Ok(futures::future::join_all(ends).await)
    }

    /// Whether it can be entered: that its file could be opened does not say so.
    async fn try_entering(&self) -> Result<(), ConnectError> {
        let timed_out = || ConnectError::System(io::ErrorKind::TimedOut.into());
        self.inside(ENTERING, || Ok(())).await.ok_or_else(timed_out)?
    }

    /// Runs something on a thread inside the namespace. Nothing, if it takes too long or too many others are waiting.
    async fn inside<T: Send + 'static>(
        &self,
        within: Duration,
        work: impl FnOnce() -> Result<T, ConnectError> + Send + 'static,
    ) -> Option<Result<T, ConnectError>> {
        let deadline = Instant::now() + within;
        let permit = timeout(within, self.threads.clone().acquire_owned()).await.ok()?.ok()?;
        let (sender, receiver) = oneshot::channel();
        let link = self.link.clone();
        let run = move || {
            let done = enter(&link).and_then(|()| work());
            drop(permit);
            drop(sender.send(done));
        };
        if let Err(error) = thread::Builder::new().name("namespace".into()).spawn(run) {
            return Some(Err(ConnectError::System(error)));
        }
        let rest = deadline.saturating_duration_since(Instant::now()) + Duration::from_secs(1);
        let done = timeout(rest, receiver).await.ok()?;
        Some(done.unwrap_or_else(|_| Err(ConnectError::System(io::Error::other("the thread ended early")))))
    }
}

/// A socket in a container's namespace on its way to somewhere.
enum Attempt {
    /// It could not even begin.
    Failed,
    /// It connects.
    Connecting(BlockingStream),
    /// It has sent a question.
    Asking(UdpSocket),
}

impl Attempt {
    fn begin(target: Target) -> Self {
        let begun = match target {
            Target::Connection(address) => begin_connection(address).map(Self::Connecting),
            Target::Question(address) => begin_question(address).map(Self::Asking),
        };
        begun.unwrap_or(Self::Failed)
    }

    async fn succeeds(self) -> io::Result<bool> {
        match self {
            Self::Failed => Ok(false),
            Self::Connecting(stream) => {
                let stream = TcpStream::from_std(stream)?;
                stream.writable().await?;
                Ok(stream.take_error()?.is_none() && stream.peer_addr().is_ok())
            }
            Self::Asking(socket) => {
                let socket = tokio::net::UdpSocket::from_std(socket)?;
                Ok(socket.recv(&mut [0; 512]).await? > 0)
            }
        }
    }
}

fn begin_connection(address: SocketAddr) -> io::Result<BlockingStream> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    match connect_socket(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket.into()),
        Err(error) => Err(error.into()),
    }
}

fn begin_question(address: SocketAddr) -> io::Result<UdpSocket> {
    // A question for a name that no resolver of ours passes on: "x.invalid", class IN, type A.
    const QUESTION: [u8; 27] = *b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01x\x07invalid\0\0\x01\0\x01";
    let any: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(address)?;
    socket.send(&QUESTION)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Entering changes the thread for good: it is of no use for anything else afterwards.
fn enter(link: &File) -> Result<(), ConnectError> {
    move_into_link_name_space(link.as_fd(), Some(LinkNameSpaceType::Network)).map_err(|error| {
        if error == Errno::PERM { ConnectError::NotPermitted } else { ConnectError::System(error.into()) }
    })
}

fn connect_loopback(port: Port, deadline: Instant) -> Result<BlockingStream, ConnectError> {
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
    Ok(stream)
}
