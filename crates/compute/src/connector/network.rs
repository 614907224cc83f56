//! The way to a container's port, whichever it is: its network namespace entered, or a forwarder inside it.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use peer_proto::unit::Port;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};

use super::{ConnectError, Namespace, forwarder::Forwarder};
use crate::runner::Remote;

/// The network of one container's present run. Drop it when the container has ended.
#[derive(Debug, Clone)]
pub enum Network {
    /// A thread of the daemon enters it for each connection.
    Entered(Namespace),
    /// A container of ours that shares it carries the connections.
    Forwarded(Arc<Forwarder>),
    /// The runner keeps one of the two.
    Beyond(Remote),
}

impl Network {
    /// Connects to the port on the container's loopback address.
    pub async fn connect(&self, port: Port, within: Duration) -> Result<Connection, ConnectError> {
        match self {
            Self::Entered(namespace) => namespace.connect(port, within).await.map(Connection::Tcp),
            Self::Forwarded(forwarder) => forwarder.connect(port, within).await.map(Connection::Unix),
            Self::Beyond(remote) => remote.connect(port, within).await,
        }
    }

    /// Whether a forwarder carries its connections.
    pub fn is_forwarded(&self) -> bool {
        match self {
            Self::Entered(_) => false,
            Self::Forwarded(_) => true,
            Self::Beyond(remote) => remote.is_forwarded(),
        }
    }
}

/// A connection to a container's port. Either kind can be half closed.
#[derive(Debug)]
pub enum Connection {
    /// Made inside the container's network namespace.
    Tcp(TcpStream),
    /// Our end of one that a forwarder has made.
    Unix(UnixStream),
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Self::Unix(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
