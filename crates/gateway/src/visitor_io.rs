//! One visitor's connection as the HTTP library sees it: only inspected bytes, and an end to every wait.
//!
//! A head that is refused is replaced by a harmless one, so that the library asks the proxy for an answer in the right
//! order; the proxy finds the reason in [`Conversation`] and sends the page for it. Nothing else is read afterwards.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};
use tokio_util::io::poll_read_buf;

use crate::strict::{Inspector, Violation};

/// Bytes read from the connection at once.
const READ_SIZE: usize = 16 * 1024;
/// Bytes of a refused visitor that are read and thrown away, so that the page reaches a visitor who is still sending.
const DISCARD_MAX: usize = 1024 * 1024;
/// Longest wait for a refused visitor's end, after the page has been sent.
const LINGER: Duration = Duration::from_secs(1);
/// What the library reads in place of a refused head.
const REPLACEMENT: &[u8] = b"GET / HTTP/1.1\r\nHost: refused\r\nConnection: close\r\n\r\n";

/// Longest waits on a visitor.
#[derive(Debug, Clone, Copy)]
pub struct Waits {
    /// From the first byte of a head to its end, and from the handshake to the end of the first head.
    pub head: Duration,
    /// Between two requests, and between two bytes of a body, either way.
    pub idle: Duration,
}

/// What the proxy and the connection tell each other.
#[derive(Debug, Clone, Default)]
pub struct Conversation {
    violation: Arc<OnceLock<Violation>>,
    in_flight: Arc<AtomicUsize>,
}

impl Conversation {
    /// Why no further request is accepted, if that is so.
    pub fn violation(&self) -> Option<Violation> {
        self.violation.get().copied()
    }

    /// Marks a request as being answered until the mark is dropped.
    pub fn answering(&self) -> Answering {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Answering(Arc::clone(&self.in_flight))
    }

    /// The first reason stands.
    fn note(&self, violation: Violation) {
        self.violation.get_or_init(|| violation);
    }

    fn is_answering(&self) -> bool {
        self.in_flight.load(Ordering::Relaxed) > 0
    }
}

/// A request is being answered; the connection is not idle.
#[derive(Debug)]
pub struct Answering(Arc<AtomicUsize>);

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a deadline that has passed means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expiry {
    Head,
    Idle,
    Body,
}

/// A refused visitor: what is left to read of the replacement, and what was thrown away.
#[derive(Debug, Default)]
struct Refused {
    replaced: usize,
    discarded: usize,
    linger: Option<Pin<Box<Sleep>>>,
}

/// The connection.
#[derive(Debug)]
pub struct VisitorIo<S> {
    inner: S,
    inspector: Inspector,
    input: BytesMut,
    /// Leading bytes of `input` that may be handed over.
    cleared: usize,
    conversation: Conversation,
    refused: Option<Refused>,
    waits: Waits,
    last_activity: Instant,
    /// When the present head began to arrive.
    head_since: Option<Instant>,
    reading_since: Option<Instant>,
    writing_since: Option<Instant>,
    read_timer: Pin<Box<Sleep>>,
    write_timer: Pin<Box<Sleep>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> VisitorIo<S> {
    /// Wraps a connection whose handshake is done.
    pub fn new(inner: S, conversation: Conversation, waits: Waits) -> Self {
        let now = Instant::now();
        Self {
            inner,
            inspector: Inspector::default(),
            input: BytesMut::new(),
            cleared: 0,
            conversation,
            refused: None,
            waits,
            last_activity: now,
            head_since: Some(now),
            reading_since: None,
            writing_since: None,
            read_timer: Box::pin(tokio::time::sleep(waits.idle)),
            write_timer: Box::pin(tokio::time::sleep(waits.idle)),
        }
    }

    fn refuse(&mut self, violation: Violation) {
        self.conversation.note(violation);
        self.refused = Some(Refused::default());
        self.input.clear();
    }

    /// Clears what can be cleared; an error is one inside a body, where no page can take the head's place.
    fn inspect(&mut self) -> io::Result<()> {
        if self.input.is_empty() {
            return Ok(());
        }
        let in_head = self.inspector.in_head();
        match self.inspector.advance(&self.input) {
            Ok(cleared) => {
                self.cleared = cleared;
                if in_head && cleared > 0 {
                    self.head_since = None;
                }
                Ok(())
            }
            Err(violation) if in_head => {
                self.refuse(violation);
                Ok(())
            }
            Err(violation) => {
                self.conversation.note(violation);
                Err(io::Error::new(io::ErrorKind::InvalidData, violation))
            }
        }
    }

    /// Reads more into `input`; `None` is the visitor's end, or ours by idleness.
    fn poll_fill(&mut self, context: &mut Context<'_>) -> Poll<io::Result<Option<()>>> {
        self.input.reserve(READ_SIZE);
        match poll_read_buf(Pin::new(&mut self.inner), context, &mut self.input) {
            Poll::Ready(Ok(0)) => Poll::Ready(Ok(None)),
            Poll::Ready(Ok(_)) => {
                self.note_read();
                Poll::Ready(Ok(Some(())))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => match ready!(self.poll_expiry(context)) {
                Expiry::Idle => Poll::Ready(Ok(None)),
                Expiry::Body => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
                Expiry::Head => {
                    self.refuse(Violation::HeadTimedOut);
                    Poll::Ready(Ok(Some(())))
                }
            },
        }
    }

    fn note_read(&mut self) {
        self.last_activity = Instant::now();
        self.reading_since = None;
        if self.inspector.in_head() {
            self.head_since.get_or_insert(self.last_activity);
        }
    }

    /// Which wait has lasted too long. Between requests nothing expires while one is still being answered.
    fn poll_expiry(&mut self, context: &mut Context<'_>) -> Poll<Expiry> {
        loop {
            let now = Instant::now();
            let (deadline, expiry) = if self.inspector.in_head() {
                match self.head_since {
                    Some(since) if self.input.is_empty() => (since + self.waits.head, Expiry::Idle),
                    Some(since) => (since + self.waits.head, Expiry::Head),
                    None if self.conversation.is_answering() => {
                        self.last_activity = now;
                        (now + self.waits.idle, Expiry::Idle)
                    }
                    None => (self.last_activity + self.waits.idle, Expiry::Idle),
                }
            } else {
                let since = *self.reading_since.get_or_insert(now);
                (since + self.waits.idle, Expiry::Body)
            };
            if deadline <= now {
                return Poll::Ready(expiry);
            }
            if self.read_timer.deadline() != deadline {
                self.read_timer.as_mut().reset(deadline);
            }
            ready!(self.read_timer.as_mut().poll(context));
        }
    }

    /// Hands over the replacement, then reads and throws away.
    fn poll_refused(&mut self, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let refused = self.refused.get_or_insert_default();
        let rest = &REPLACEMENT[refused.replaced..];
        if !rest.is_empty() {
            let taken = rest.len().min(buffer.remaining());
            buffer.put_slice(&rest[..taken]);
            refused.replaced += taken;
            return Poll::Ready(Ok(()));
        }
        // An end or an error would make the library drop the answer, so it learns of neither.
        ready!(self.poll_discard(context));
        Poll::Pending
    }

    /// Ready at the visitor's end, or once enough was thrown away.
    fn poll_discard(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let refused = self.refused.get_or_insert_default();
        while refused.discarded < DISCARD_MAX {
            self.input.clear();
            self.input.reserve(READ_SIZE);
            match ready!(poll_read_buf(Pin::new(&mut self.inner), context, &mut self.input)) {
                Ok(0) | Err(_) => break,
                Ok(count) => refused.discarded += count,
            }
        }
        Poll::Ready(())
    }

    /// Passes a write's outcome on; a write that waits too long fails.
    fn bound_write<T>(&mut self, context: &mut Context<'_>, outcome: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if outcome.is_ready() {
            self.writing_since = None;
            self.last_activity = Instant::now();
            return outcome;
        }
        if self.inspector.is_opaque() && !self.conversation.is_answering() {
            return Poll::Pending;
        }
        let since = *self.writing_since.get_or_insert_with(Instant::now);
        let deadline = since + self.waits.idle;
        if self.write_timer.deadline() != deadline {
            self.write_timer.as_mut().reset(deadline);
        }
        ready!(self.write_timer.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for VisitorIo<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if this.refused.is_some() {
                return this.poll_refused(context, buffer);
            }
            if this.cleared > 0 {
                let taken = this.cleared.min(buffer.remaining());
                buffer.put_slice(&this.input[..taken]);
                this.input.advance(taken);
                this.cleared -= taken;
                return Poll::Ready(Ok(()));
            }
            this.inspect()?;
            if this.cleared > 0 || this.refused.is_some() {
                continue;
            }
            if this.inspector.is_opaque() {
                return Pin::new(&mut this.inner).poll_read(context, buffer);
            }
            if ready!(this.poll_fill(context))?.is_none() {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for VisitorIo<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.inner).poll_write(context, bytes);
        self.bound_write(context, outcome)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.inner).poll_write_vectored(context, slices);
        self.bound_write(context, outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.inner).poll_flush(context);
        self.bound_write(context, outcome)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let lingering = this.refused.as_ref().is_some_and(|refused| refused.linger.is_some());
        if !lingering {
            let outcome = Pin::new(&mut this.inner).poll_shutdown(context);
            ready!(this.bound_write(context, outcome))?;
        }
        // Closing a socket with unread bytes would reset it and take the page away from the visitor.
        let Some(refused) = &mut this.refused else { return Poll::Ready(Ok(())) };
        let linger = refused.linger.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER)));
        if linger.as_mut().poll(context).is_pending() {
            ready!(this.poll_discard(context));
        }
        Poll::Ready(Ok(()))
    }
}
