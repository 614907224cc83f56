//! One request, from a visitor to the deployment that its name means, and the answer back.
//!
//! The only thing a request chooses is a live lease; the gateway has no way to dial an address that a visitor names.

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, Version};
use hyper::body::{Body as _, Incoming};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::body::{OriginBody, RequestBody, ResponseBody};
use crate::headers;
use crate::idle::IdleClock;
use crate::leases::{Ending, Lease, Leases, Lookup};
use crate::limits::{ConnectionSlot, Rates};
use crate::metrics::Metrics;
use crate::names::{self, Destination, Domain, Unaddressed};
use crate::pages::Page;
use crate::pool::{Pool, Reusable};
use crate::relay;
use crate::visitor_io::{Answering, Conversation};

/// Longest waits on a deployment.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Without a byte of the request's or the answer's body, either way.
    pub idle: Duration,
    /// Without a byte either way after a switch to WebSocket.
    pub upgraded_idle: Duration,
}

/// What all requests share.
#[derive(Debug)]
pub struct Proxy {
    /// The domain of all names.
    pub domain: Domain,
    /// Live names.
    pub leases: Arc<Leases>,
    /// Requests per second.
    pub rates: Rates,
    /// Streams to deployments.
    pub pool: Pool,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Longest waits.
    pub patience: Patience,
    /// Owner of the relays of switched connections.
    pub tasks: TaskTracker,
    /// Cancelled when the gateway stops.
    pub stop: CancellationToken,
}

/// One visitor's connection.
#[derive(Debug, Clone)]
pub struct Visitor {
    /// Where it comes from.
    pub address: IpAddr,
    /// The name in its TLS handshake.
    pub server_name: Option<Arc<str>>,
    /// Shared with the connection's reader.
    pub conversation: Conversation,
    /// The connection's place in the count; a relay holds it too.
    pub connection_slot: Arc<ConnectionSlot>,
}

/// A request that may go to its deployment.
struct Visit {
    lease: Lease,
    destination: Destination,
    address: IpAddr,
    slot: OwnedSemaphorePermit,
}

/// A request to switch to WebSocket.
struct Switching {
    visitor_side: OnUpgrade,
    connection_slot: Arc<ConnectionSlot>,
}

/// What is needed to send a request without body once more.
struct Replay {
    method: Method,
    uri: Uri,
    headers: http::HeaderMap,
}

/// What came of sending a request.
enum Sent {
    Answered(Response<Incoming>, Reusable),
    /// Nothing of an answer came, and sending it again cannot do anything twice.
    Again(Request<RequestBody>),
    Failed(Page),
}

impl Proxy {
    /// Answers one request, always: with the deployment's answer or with a page. What the connection's reader has said
    /// by now concerns this request; what it says later concerns the next.
    pub fn answer(
        self: Arc<Self>,
        visitor: Visitor,
        request: Request<Incoming>,
    ) -> impl Future<Output = Result<Response<ResponseBody>, Infallible>> {
        let (answering, violation) = (visitor.conversation.answering(), visitor.conversation.violation());
        let is_http_10 = request.version() == Version::HTTP_10;
        async move {
            let admitted = match violation {
                Some(violation) => Err(Page::Violation(violation)),
                None => self.admit(&visitor, &request),
            };
            let outcome = match admitted {
                Ok(visit) => self.forward(visit, request, &visitor).await,
                Err(page) => Err(page),
            };
            let mut response = match outcome {
                Ok((head, body)) => Response::from_parts(head, ResponseBody::origin(body, answering)),
                Err(page) => self.page(page, answering),
            };
            if is_http_10 {
                // Said in its own version, or the library would offer to keep the connection as well.
                *response.version_mut() = Version::HTTP_10;
                response.headers_mut().insert(http::header::CONNECTION, HeaderValue::from_static("close"));
            }
            self.metrics.count_response(response.status());
            Ok(response)
        }
    }

    fn page(&self, page: Page, answering: Answering) -> Response<ResponseBody> {
        self.metrics.count_page(page.code());
        page.response().map(|body| ResponseBody::page(body, answering))
    }

    /// Decides, without waiting, whether and where a request may go.
    fn admit(&self, visitor: &Visitor, request: &Request<Incoming>) -> Result<Visit, Page> {
        self.rates.visitor(visitor.address).map_err(|wait| Page::TooManyRequests(wait.0))?;
        if self.stop.is_cancelled() {
            return Err(Page::ShuttingDown);
        }
        let destination =
            names::destination(request.uri(), request.headers(), visitor.server_name.as_deref(), &self.domain)
                .map_err(|reason| match reason {
                    Unaddressed::NoSuchName => Page::NoSuchName,
                    reason => Page::Unaddressed(reason),
                })?;
        let lease = match self.leases.find(&destination.label) {
            Lookup::Live(lease) => lease,
            ended => return Err(ended_page(&ended)),
        };
        self.rates.name(lease.label).map_err(|wait| Page::TooManyRequests(wait.0))?;
        let slot = Arc::clone(&lease.slots).try_acquire_owned().map_err(|_| Page::ProviderBusy)?;
        Ok(Visit { lease, destination, address: visitor.address, slot })
    }

    async fn forward(
        &self,
        visit: Visit,
        mut request: Request<Incoming>,
        visitor: &Visitor,
    ) -> Result<(http::response::Parts, OriginBody), Page> {
        let switching = headers::wants_websocket(request.headers()).then(|| Switching {
            visitor_side: hyper::upgrade::on(&mut request),
            connection_slot: Arc::clone(&visitor.connection_slot),
        });
        let (clock, broken) = (IdleClock::default(), Arc::new(AtomicBool::new(false)));
        let (parts, body) = request.into_parts();
        let bodiless = body.is_end_stream();
        let head = origin_head(parts, &visit);
        let replay = (bodiless && head.method.is_idempotent()).then(|| Replay {
            method: head.method.clone(),
            uri: head.uri.clone(),
            headers: head.headers.clone(),
        });
        let body = RequestBody::new(body, clock.clone(), Arc::clone(&broken));
        let request = Request::from_parts(head, body);
        let sending = self.send(&visit, request, replay, &clock);
        let answer = tokio::select! {
            answer = sending => answer,
            () = visit.lease.ended.cancelled() => return Err(ended_page(&self.leases.find(&visit.lease.label))),
        };
        let (response, reusable) =
            answer.map_err(|page| if broken.load(Ordering::Relaxed) { Page::BodyBroken } else { page })?;
        self.receive(visit, response, reusable, switching, clock)
    }

    /// Sends over a kept stream if there is one, and once more over a fresh one where that cannot do anything twice.
    async fn send(
        &self,
        visit: &Visit,
        request: Request<RequestBody>,
        replay: Option<Replay>,
        clock: &IdleClock,
    ) -> Result<(Response<Incoming>, Reusable), Page> {
        let mut request = request;
        if let Some(kept) = self.pool.kept(&visit.lease, visit.address).await {
            match self.send_over(kept, request, replay, clock).await {
                Sent::Answered(response, reusable) => return Ok((response, reusable)),
                Sent::Failed(page) => return Err(page),
                Sent::Again(again) => request = again,
            }
        }
        let fresh = self.pool.open(&visit.lease, visit.address).await?;
        match self.send_over(fresh, request, None, clock).await {
            Sent::Answered(response, reusable) => Ok((response, reusable)),
            Sent::Failed(page) => Err(page),
            Sent::Again(_) => Err(Page::DeploymentFailed),
        }
    }

    async fn send_over(
        &self,
        mut stream: Reusable,
        request: Request<RequestBody>,
        replay: Option<Replay>,
        clock: &IdleClock,
    ) -> Sent {
        clock.touch();
        let sending = stream.sender().try_send_request(request);
        let outcome = tokio::select! {
            outcome = sending => outcome,
            () = clock.expired(self.patience.idle) => return Sent::Failed(Page::DeploymentTimedOut),
        };
        match outcome {
            Ok(response) => Sent::Answered(response, stream),
            Err(mut failure) => match (failure.take_message(), replay) {
                (Some(request), _) => Sent::Again(request),
                (None, Some(replay)) if no_answer_began(failure.error()) => Sent::Again(replay.request(clock.clone())),
                (None, _) => {
                    tracing::debug!(error = %failure.error(), "no answer from the deployment");
                    Sent::Failed(Page::DeploymentFailed)
                }
            },
        }
    }

    fn receive(
        &self,
        visit: Visit,
        mut response: Response<Incoming>,
        reusable: Reusable,
        switching: Option<Switching>,
        clock: IdleClock,
    ) -> Result<(http::response::Parts, OriginBody), Page> {
        let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        let wants_switch = switching.is_some();
        let Visit { lease, destination, slot, .. } = visit;
        let (slot, reusable) = match switching {
            Some(switching) if switched && headers::names_websocket(response.headers()) => {
                self.start_relay(lease.clone(), slot, switching, hyper::upgrade::on(&mut response));
                (None, None)
            }
            _ if switched => return Err(Page::DeploymentFailed),
            _ => (Some(slot), Some(reusable)),
        };
        let (mut head, body) = response.into_parts();
        headers::to_visitor(&mut head.headers, &destination.host, head.version, switched);
        head.version = Version::HTTP_11;
        head.extensions.clear();
        // Bytes behind a request to switch are not HTTP that we have inspected; so without a switch nothing follows.
        if wants_switch && !switched {
            head.headers.insert(http::header::CONNECTION, HeaderValue::from_static("close"));
        }
        let body = OriginBody::new(body, clock, self.patience.idle, lease.ended, reusable, slot);
        Ok((head, body))
    }

    fn start_relay(&self, lease: Lease, slot: OwnedSemaphorePermit, switching: Switching, origin_side: OnUpgrade) {
        let (idle, wait, stop) = (self.patience.upgraded_idle, self.patience.idle, self.stop.clone());
        let metrics = Arc::clone(&self.metrics);
        self.tasks.spawn(async move {
            let Switching { visitor_side, connection_slot } = switching;
            let switch = async { tokio::try_join!(visitor_side, origin_side) };
            let Ok(Ok((visitor, origin))) = tokio::time::timeout(wait, switch).await else { return };
            let _counted = metrics.count_relay();
            tokio::select! {
                () = relay::relay(TokioIo::new(visitor), TokioIo::new(origin), idle) => {}
                () = lease.ended.cancelled() => {}
                () = stop.cancelled() => {}
            }
            drop((slot, connection_slot));
        });
    }
}

impl Replay {
    fn request(self, clock: IdleClock) -> Request<RequestBody> {
        let mut request = Request::new(RequestBody::empty(clock));
        *request.method_mut() = self.method;
        *request.uri_mut() = self.uri;
        *request.headers_mut() = self.headers;
        request
    }
}

/// True if the stream ended before any byte of an answer.
fn no_answer_began(error: &hyper::Error) -> bool {
    error.is_canceled() || error.is_closed() || error.is_incomplete_message()
}

fn ended_page(lookup: &Lookup) -> Page {
    match lookup {
        Lookup::Ended(Ending::Released) => Page::Stopped,
        // A name that is live again was registered anew meanwhile: the visit's own lease was lost.
        Lookup::Ended(Ending::Lost) | Lookup::Live(_) => Page::ProviderOffline,
        Lookup::Unknown => Page::NoSuchName,
    }
}

/// The head that goes to the deployment: the path alone, and the fields that may cross.
fn origin_head(mut parts: Parts, visit: &Visit) -> Parts {
    headers::to_origin(&mut parts.headers, visit.address, &visit.destination, parts.version);
    let path = parts.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    parts.uri = Uri::from(path);
    parts.version = Version::HTTP_11;
    parts.extensions.clear();
    parts
}
