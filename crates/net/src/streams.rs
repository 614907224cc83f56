//! Streams as the rest of the program sees them. A stream keeps its place in the connection's count until dropped.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::{AsyncRead, AsyncWrite};
use libp2p::core::upgrade::NegotiationError;
use libp2p::{Multiaddr, PeerId};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt};

use crate::gate::Role;
use crate::protocol::Protocol;

/// A [`Stream`] that implements tokio's `AsyncRead` and `AsyncWrite`.
pub type TokioStream = Compat<Stream>;

/// One stream to a proven peer; `futures`' `AsyncRead` and `AsyncWrite`.
///
/// Both halves must be driven at once: a side that writes all before it reads stalls once the other's window is full.
/// Closing ends the writing half; dropping an open stream resets it.
pub struct Stream {
    inner: libp2p::Stream,
    peer: PeerId,
    protocol: Protocol,
    /// Reading has failed. The negotiation inside the stream must not be touched after that.
    broken: bool,
    _slot: OwnedSemaphorePermit,
}

impl Stream {
    pub(crate) fn new(inner: libp2p::Stream, peer: PeerId, protocol: Protocol, slot: OwnedSemaphorePermit) -> Self {
        Self { inner, peer, protocol, broken: false, _slot: slot }
    }

    /// The peer at the other end.
    pub fn peer(&self) -> PeerId {
        self.peer
    }

    /// The protocol that was negotiated.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// The same stream under tokio's traits.
    pub fn into_tokio(self) -> TokioStream {
        self.compat()
    }

    fn usable(&mut self) -> io::Result<Pin<&mut libp2p::Stream>> {
        if self.broken { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(Pin::new(&mut self.inner)) }
    }

    /// Notes a failed read, and gives a refused protocol its name.
    fn after_read(&mut self, outcome: io::Result<usize>) -> io::Result<usize> {
        outcome.map_err(|error| {
            self.broken = true;
            let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<NegotiationError>());
            match inner {
                Some(NegotiationError::Failed) => {
                    let text = format!("{} does not let this machine use {}", self.peer, self.protocol);
                    io::Error::new(io::ErrorKind::PermissionDenied, text)
                }
                _ => error,
            }
        })
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Stream")
            .field("peer", &self.peer)
            .field("protocol", &self.protocol)
            .finish_non_exhaustive()
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let outcome = ready!(self.usable()?.poll_read(context, buffer));
        Poll::Ready(self.after_read(outcome))
    }

    fn poll_read_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = ready!(self.usable()?.poll_read_vectored(context, buffers));
        Poll::Ready(self.after_read(outcome))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        self.usable()?.poll_write(context, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.usable()?.poll_write_vectored(context, buffers)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.usable()?.poll_flush(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.usable()?.poll_close(context)
    }
}

/// A stream that a peer has opened here.
#[derive(Debug)]
pub struct InboundStream {
    /// The peer, proven by the handshake.
    pub peer: PeerId,
    /// The peer's role when its connection was established.
    pub role: Role,
    /// The protocol that the peer chose among those offered to its role.
    pub protocol: Protocol,
    /// Address of the peer's end of the connection.
    pub address: Multiaddr,
    /// The bytes.
    pub stream: Stream,
}

/// All streams opened by peers, over all protocols and connections, in order of arrival.
#[derive(Debug)]
pub struct Incoming {
    streams: mpsc::Receiver<InboundStream>,
}

impl Incoming {
    pub(crate) fn new(streams: mpsc::Receiver<InboundStream>) -> Self {
        Self { streams }
    }

    /// The next stream; `None` once the network has shut down. Handing each stream to its own task keeps the bounded
    /// queue short: streams that find it full are reset.
    pub async fn next(&mut self) -> Option<InboundStream> {
        self.streams.recv().await
    }
}
