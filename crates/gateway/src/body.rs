//! Bodies on their way through the gateway, frame by frame; nothing is gathered.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Sleep;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::idle::IdleClock;
use crate::pool::Reusable;
use crate::visitor_io::Answering;

/// Why a body broke off.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The connection it comes from failed.
    #[error(transparent)]
    Source(#[from] hyper::Error),
    /// Nothing came for too long.
    #[error("the body stood still for too long")]
    Idle,
    /// The deployment's name ended.
    #[error("the deployment was stopped or its machine was lost")]
    Ended,
}

/// A visitor's body on its way to the deployment.
#[derive(Debug)]
pub struct RequestBody {
    inner: Option<Incoming>,
    clock: IdleClock,
    broken: Arc<AtomicBool>,
}

impl RequestBody {
    /// Passes `inner` on. `broken` becomes true if it fails on the visitor's side.
    pub fn new(inner: Incoming, clock: IdleClock, broken: Arc<AtomicBool>) -> Self {
        Self { inner: Some(inner), clock, broken }
    }

    /// No bytes.
    pub fn empty(clock: IdleClock) -> Self {
        Self { inner: None, clock, broken: Arc::default() }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(inner) = &mut self.inner else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(inner).poll_frame(context));
        self.clock.touch();
        if matches!(frame, Some(Err(_))) {
            self.broken.store(true, Ordering::Relaxed);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint)
    }
}

/// A deployment's body on its way to the visitor. Broken off when nothing moves either way for too long, and the moment
/// the deployment's name ends.
#[derive(Debug)]
pub struct OriginBody {
    inner: Incoming,
    complete: bool,
    waiting: bool,
    clock: IdleClock,
    idle: Duration,
    timer: Pin<Box<Sleep>>,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
    /// The stream, for the visitor's next request.
    reusable: Option<Reusable>,
    /// Held until the last byte has been passed on.
    _slot: Option<OwnedSemaphorePermit>,
}

impl OriginBody {
    /// Passes `inner` on. After a switch of protocols somebody else holds stream and slot.
    pub fn new(
        inner: Incoming,
        clock: IdleClock,
        idle: Duration,
        ended: CancellationToken,
        reusable: Option<Reusable>,
        slot: Option<OwnedSemaphorePermit>,
    ) -> Self {
        Self {
            inner,
            complete: false,
            waiting: false,
            clock,
            idle,
            timer: Box::pin(tokio::time::sleep(idle)),
            ended: Box::pin(ended.cancelled_owned()),
            reusable,
            _slot: slot,
        }
    }

    /// Ready once waiting makes no sense any more.
    fn poll_over(&mut self, context: &mut Context<'_>) -> Poll<BodyError> {
        if self.ended.as_mut().poll(context).is_ready() {
            return Poll::Ready(BodyError::Ended);
        }
        if !self.waiting {
            // A visitor who read slowly until now is no reason to blame the deployment.
            self.waiting = true;
            self.clock.touch();
        }
        loop {
            let deadline = self.clock.deadline(self.idle);
            if self.timer.deadline() != deadline {
                self.timer.as_mut().reset(deadline);
            }
            ready!(self.timer.as_mut().poll(context));
            if self.clock.deadline(self.idle) == deadline {
                return Poll::Ready(BodyError::Idle);
            }
        }
    }

    fn poll_frame(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match Pin::new(&mut self.inner).poll_frame(context) {
            Poll::Ready(frame) => {
                self.waiting = false;
                self.clock.touch();
                self.complete = frame.is_none();
                Poll::Ready(frame.map(|frame| frame.map_err(BodyError::from)))
            }
            Poll::Pending => self.poll_over(context).map(|error| Some(Err(error))),
        }
    }
}

impl Drop for OriginBody {
    fn drop(&mut self) {
        if (self.complete || self.inner.is_end_stream())
            && let Some(reusable) = self.reusable.take()
        {
            reusable.keep();
        }
    }
}

/// What a visitor gets.
#[derive(Debug)]
pub struct ResponseBody {
    content: Content,
    _answering: Answering,
}

#[derive(Debug)]
enum Content {
    Page(Full<Bytes>),
    Origin(Box<OriginBody>),
}

impl ResponseBody {
    /// A page of the gateway.
    pub fn page(page: Full<Bytes>, answering: Answering) -> Self {
        Self { content: Content::Page(page), _answering: answering }
    }

    /// A deployment's answer.
    pub fn origin(body: OriginBody, answering: Answering) -> Self {
        Self { content: Content::Origin(Box::new(body)), _answering: answering }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.content {
            Content::Page(page) => Pin::new(page).poll_frame(context).map_err(|never| match never {}),
            Content::Origin(origin) => origin.poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Page(page) => page.is_end_stream(),
            Content::Origin(origin) => origin.inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Page(page) => page.size_hint(),
            Content::Origin(origin) => origin.inner.size_hint(),
        }
    }
}
