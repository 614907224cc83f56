//! Bytes both ways after a switch of protocols, until both sides have ended or nothing moves for too long.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::idle::IdleClock;

/// Bytes held for each direction.
const BUFFER: usize = 16 * 1024;

/// Copies both ways; returns when both directions have ended, one has failed, or both stood still for `idle`.
pub(crate) async fn relay<A, B>(visitor: A, origin: B, idle: Duration)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let clock = IdleClock::default();
    let mut visitor = Observed { inner: visitor, clock: clock.clone() };
    let mut origin = Observed { inner: origin, clock: clock.clone() };
    tokio::select! {
        // How it ended is the two programs' own affair.
        _ = tokio::io::copy_bidirectional_with_sizes(&mut visitor, &mut origin, BUFFER, BUFFER) => {}
        () = clock.expired(idle) => {}
    }
}

/// Moves the clock with each read that brings something.
struct Observed<S> {
    inner: S,
    clock: IdleClock,
}

impl<S: AsyncRead + Unpin> AsyncRead for Observed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.inner).poll_read(context, buffer);
        if outcome.is_ready() {
            self.clock.touch();
        }
        outcome
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Observed<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}
