//! Yamux on one connection, bounded by what its peer is to us: how many streams, how much of them unread, how many new
//! ones a second.
//!
//! Nothing of a stream is counted or refused before the multiplexer has taken its first bytes, so that the bounds stand
//! here. Whoever opens streams faster than he may is read more slowly, and learns it by his own full buffers.

use std::collections::VecDeque;
use std::future::{Ready, ready};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use futures::{AsyncRead, AsyncWrite};
use governor::clock::{Clock, DefaultClock};
use libp2p::core::muxing::{StreamMuxer, StreamMuxerEvent};
use libp2p::core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo};
use tokio::time::Sleep;
use yamux::{Config, Connection, ConnectionError, DEFAULT_CREDIT, Mode};

use crate::share::Pace;

/// By how much the windows of one connection's streams may grow together beyond what each has at first (bytes).
const WINDOW_GROWTH: usize = 16 << 20;

/// The bounds of one connection.
#[derive(Debug, Clone)]
pub(crate) struct Multiplexing {
    /// Streams that may be open at one time; one more ends the connection.
    pub(crate) streams: usize,
    /// Streams that may wait to be looked at; more are reset.
    pub(crate) waiting: usize,
    /// New streams a second, over all connections of the peer.
    pub(crate) pace: Option<Arc<Pace>>,
}

impl Multiplexing {
    fn connect<C: AsyncRead + AsyncWrite + Unpin>(self, socket: C, mode: Mode) -> Multiplexer<C> {
        let mut config = Config::default();
        let first = usize::try_from(DEFAULT_CREDIT).unwrap_or(usize::MAX);
        // Each of the two setters checks itself against the other's value.
        config.set_max_connection_receive_window(None).set_max_num_streams(self.streams);
        config.set_max_connection_receive_window(Some(self.streams.saturating_mul(first) + WINDOW_GROWTH));
        let connection = Connection::new(socket, config, mode);
        let arrived = VecDeque::new();
        Multiplexer { connection, arrived, waiting: self.waiting, waker: None, pace: self.pace, pause: None }
    }
}

impl UpgradeInfo for Multiplexing {
    type Info = &'static str;
    type InfoIter = std::iter::Once<Self::Info>;

    fn protocol_info(&self) -> Self::InfoIter {
        std::iter::once("/yamux/1.0.0")
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> InboundConnectionUpgrade<C> for Multiplexing {
    type Output = Multiplexer<C>;
    type Error = io::Error;
    type Future = Ready<Result<Self::Output, Self::Error>>;

    fn upgrade_inbound(self, socket: C, _: Self::Info) -> Self::Future {
        ready(Ok(self.connect(socket, Mode::Server)))
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> OutboundConnectionUpgrade<C> for Multiplexing {
    type Output = Multiplexer<C>;
    type Error = io::Error;
    type Future = Ready<Result<Self::Output, Self::Error>>;

    fn upgrade_outbound(self, socket: C, _: Self::Info) -> Self::Future {
        ready(Ok(self.connect(socket, Mode::Client)))
    }
}

/// A connection that carries streams.
#[derive(Debug)]
pub(crate) struct Multiplexer<C> {
    connection: Connection<C>,
    /// Streams that came while somebody else than their taker drove the connection.
    arrived: VecDeque<yamux::Stream>,
    waiting: usize,
    /// Whoever waits for the next of them.
    waker: Option<Waker>,
    pace: Option<Arc<Pace>>,
    /// Until when nothing is read, because a stream came too early.
    pause: Option<Pin<Box<Sleep>>>,
}

impl<C: AsyncRead + AsyncWrite + Unpin> Multiplexer<C> {
    /// Drives the connection up to its next stream.
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<yamux::Stream, ConnectionError>> {
        while let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(context));
            self.pause = self.too_early();
        }
        let stream = ready!(self.connection.poll_next_inbound(context)).unwrap_or(Err(ConnectionError::Closed))?;
        self.pause = self.too_early();
        Poll::Ready(Ok(stream))
    }

    /// The pause that is due, if the stream that has just come was one too many.
    fn too_early(&self) -> Option<Pin<Box<Sleep>>> {
        let later = self.pace.as_ref()?.check().err()?;
        Some(Box::pin(tokio::time::sleep(later.wait_time_from(DefaultClock::default().now()))))
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> StreamMuxer for Multiplexer<C> {
    type Substream = yamux::Stream;
    type Error = io::Error;

    fn poll_inbound(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<Self::Substream>> {
        if let Some(stream) = self.arrived.pop_front() {
            return Poll::Ready(Ok(stream));
        }
        if let Poll::Ready(next) = self.poll_next(context) {
            return Poll::Ready(next.map_err(into_io));
        }
        self.waker = Some(context.waker().clone());
        Poll::Pending
    }

    fn poll_outbound(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<Self::Substream>> {
        self.connection.poll_new_outbound(context).map_err(into_io)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.connection.poll_close(context).map_err(into_io)
    }

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<StreamMuxerEvent>> {
        let stream = ready!(self.poll_next(context)).map_err(into_io)?;
        // Beyond the bound it is dropped, which resets it.
        if self.arrived.len() < self.waiting {
            self.arrived.push_back(stream);
            if let Some(waker) = self.waker.take() {
                waker.wake();
            }
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

fn into_io(error: ConnectionError) -> io::Error {
    match error {
        ConnectionError::Io(error) => error,
        error => io::Error::other(error),
    }
}
