//! The local interface: HTTP/1.1 on a Unix socket, for the user of this machine (SECURITY M24).
//!
//! The socket (0600) stands in a directory of its own (0700), both of the configured user, and each connection's
//! credentials are checked as well. Every request carries a header that no web page can send by itself.

mod audit;
mod deployments;
mod doctor;
mod emergency;
mod events;
mod gateways;
mod identity;
mod images;
mod invitations;
mod limits;
mod pause;
mod peers;
pub(crate) mod socket;
mod status;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, FromRequest, FromRequestParts, Query, Request, State};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use peer_proto::code::{Code, ExitStatus, Problem};
use peer_proto::control::REQUIRED_HEADER;
use peer_proto::text::escape;
use peer_state::database::DatabaseError;
use peer_trust::trust::ChangeError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::os::unix::net::UnixListener as BlockingListener;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use zeroize::Zeroize;

use crate::daemon::Daemon;
use crate::gateways::GatewayError;
use crate::introduction::change_problem;

pub use socket::SocketError;

/// Version of this interface.
pub const VERSION: u32 = 1;
/// Media type of streamed answers.
const NDJSON: &str = "application/x-ndjson";
/// Largest body of a request, unless its route says otherwise (bytes).
const BODY_MAX: usize = 4 * 1024 * 1024;
/// Connections that may be open at one time.
const CONNECTIONS_MAX: usize = 256;
/// Connections to the metrics listener that may be open at one time.
const SCRAPES_MAX: usize = 16;
/// How long a request's head may take to arrive.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a request that is no stream may take.
const REQUEST_TIMEOUT: Duration = Duration::from_mins(1);
/// How long open requests may go on when the daemon ends.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(3);
/// Pause after a failed accept, which usually means too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why the local interface is not served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket cannot be made.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The socket cannot be used.
    #[error("the socket of the local interface cannot be used: {0}")]
    Listener(io::Error),
    /// The metrics' address cannot be listened on.
    #[error("cannot serve metrics on {address}: {source}; choose another metrics_listen")]
    Metrics {
        /// The address.
        address: std::net::SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// The running interface.
#[derive(Debug)]
pub struct Api {
    socket: std::path::PathBuf,
    tasks: TaskTracker,
    stop: CancellationToken,
    kill: CancellationToken,
}

impl Api {
    /// Accepts nothing more, lets open requests end for a moment, and cuts the rest.
    pub async fn shutdown(self) {
        self.stop.cancel();
        drop(std::fs::remove_file(&self.socket));
        self.tasks.close();
        if tokio::time::timeout(DRAIN_TIMEOUT, self.tasks.wait()).await.is_err() {
            self.kill.cancel();
            self.tasks.wait().await;
        }
    }
}

/// Makes the socket and serves it.
pub async fn serve(daemon: &Arc<Daemon>) -> Result<Api, ServeError> {
    let listener = socket::bind(&daemon.settings.socket, daemon.settings.socket_owner)?;
    serve_on(daemon, listener).await
}

/// Serves a socket that has been made already.
pub(crate) async fn serve_on(daemon: &Arc<Daemon>, listener: BlockingListener) -> Result<Api, ServeError> {
    let settings = &daemon.settings;
    let listener = listener.set_nonblocking(true).and_then(|()| UnixListener::from_std(listener));
    let listener = listener.map_err(ServeError::Listener)?;
    let api = Api {
        socket: settings.socket.clone(),
        tasks: TaskTracker::new(),
        stop: CancellationToken::new(),
        kill: CancellationToken::new(),
    };
    if let Some(address) = settings.metrics_listen {
        let failed = |source| ServeError::Metrics { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let router = Router::new().route("/metrics", axum::routing::get(events::metrics)).with_state(daemon.clone());
        api.tasks.spawn(accept_metrics(listener, router, connections(&api, SCRAPES_MAX)));
    }
    let router = router(daemon.clone(), api.stop.clone());
    let owner = settings.socket_owner;
    api.tasks.spawn(accept(listener, owner, router, connections(&api, CONNECTIONS_MAX)));
    Ok(api)
}

/// Everything that the local user can ask for. Streams end when `stop` says so.
fn router(daemon: Arc<Daemon>, stop: CancellationToken) -> Router {
    let answered_at_once = Router::new()
        .merge(identity::routes())
        .merge(peers::routes())
        .merge(invitations::routes())
        .merge(gateways::routes())
        .merge(limits::routes())
        .merge(pause::routes())
        .merge(emergency::routes())
        .merge(audit::routes())
        .merge(status::routes())
        .merge(doctor::routes())
        .layer(from_fn(time_limit));
    Router::new()
        .merge(answered_at_once)
        .merge(events::routes())
        .merge(deployments::routes())
        .merge(images::routes())
        .fallback(no_such_route)
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .layer(from_fn_with_state(stop, end_with_daemon))
        .layer(from_fn(require_header))
        .with_state(daemon)
}

async fn no_such_route() -> Failure {
    let message = "this daemon has no such request; its version and that of peerctl may differ (`peerctl version`)";
    Failure(Problem::new(Code::UnsupportedVersion, message))
}

/// No web page can send this header to another origin without being asked first, and nobody answers that question.
async fn require_header(request: Request, next: Next) -> Response {
    if request.headers().get(REQUIRED_HEADER).is_some_and(|value| value == "1") {
        next.run(request).await
    } else {
        let message = format!("the request lacks the header '{REQUIRED_HEADER}: 1'");
        Failure(Problem::new(Code::InvalidArgument, message)).into_response()
    }
}

async fn time_limit(request: Request, next: Next) -> Response {
    if let Ok(response) = tokio::time::timeout(REQUEST_TIMEOUT, next.run(request)).await {
        return response;
    }
    let message = format!("the daemon did not finish this within {} seconds", REQUEST_TIMEOUT.as_secs());
    Failure(Problem::new(Code::Timeout, message)).into_response()
}

/// Ends streamed answers in order when the daemon ends, instead of cutting their connection.
async fn end_with_daemon(State(stop): State<CancellationToken>, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    if response.headers().get(header::CONTENT_TYPE).is_none_or(|media| media != NDJSON) {
        return response;
    }
    response.map(|body| Body::from_stream(body.into_data_stream().take_until(stop.cancelled_owned())))
}

/// What the accept loops and the connections share.
#[derive(Debug, Clone)]
struct Connections {
    free: Arc<Semaphore>,
    tasks: TaskTracker,
    stop: CancellationToken,
    kill: CancellationToken,
}

fn connections(api: &Api, limit: usize) -> Connections {
    let free = Arc::new(Semaphore::new(limit));
    Connections { free, tasks: api.tasks.clone(), stop: api.stop.clone(), kill: api.kill.clone() }
}

async fn accept(listener: UnixListener, owner: u32, router: Router, connections: Connections) {
    while let Some(accepted) = connections.stop.run_until_cancelled(listener.accept()).await {
        match accepted {
            Ok((stream, _)) if is_allowed(&stream, owner) => connections.serve(stream, router.clone()),
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "the local interface could not accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn accept_metrics(listener: TcpListener, router: Router, connections: Connections) {
    while let Some(accepted) = connections.stop.run_until_cancelled(listener.accept()).await {
        match accepted {
            Ok((stream, _)) => connections.serve(stream, router.clone()),
            Err(error) => {
                tracing::warn!(%error, "the metrics listener could not accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn is_allowed(stream: &UnixStream, owner: u32) -> bool {
    let own = rustix::process::geteuid().as_raw();
    match stream.peer_cred() {
        Ok(credentials) if socket::may_connect(credentials.uid(), owner, own) => true,
        Ok(credentials) => {
            tracing::warn!(uid = credentials.uid(), "a user who may not use the local interface was refused");
            false
        }
        Err(error) => {
            tracing::warn!(%error, "a connection without credentials was refused");
            false
        }
    }
}

impl Connections {
    /// Serves one connection in a task of its own; one too many is closed at once.
    fn serve<S>(&self, stream: S, router: Router)
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let Ok(permit) = self.free.clone().try_acquire_owned() else {
            tracing::warn!("too many connections to the local interface; one was closed");
            return;
        };
        let (stop, kill) = (self.stop.clone(), self.kill.clone());
        self.tasks.spawn(async move { kill.run_until_cancelled(one(stream, router, stop, permit)).await });
    }
}

async fn one<S>(stream: S, router: Router, stop: CancellationToken, _permit: OwnedSemaphorePermit)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "a connection to the local interface broke");
    }
}

/// A failure as an answer: its code as JSON, with the status that fits.
#[derive(Debug)]
pub struct Failure(pub Problem);

/// Does the work as a task of the daemon's, so that it comes to its end even if the client goes away in the middle.
async fn to_the_end<T, W>(daemon: &Arc<Daemon>, work: W) -> Result<T, Failure>
where
    T: Send + 'static,
    W: Future<Output = Result<T, Failure>> + Send + 'static,
{
    match daemon.tasks.spawn(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(Problem::new(Code::ShuttingDown, "the daemon is shutting down").into()),
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (status_of(self.0.code), axum::Json(self.0)).into_response()
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl From<ChangeError> for Failure {
    fn from(error: ChangeError) -> Self {
        Self(change_problem(error))
    }
}

impl From<GatewayError> for Failure {
    fn from(error: GatewayError) -> Self {
        Self(error.into())
    }
}

impl From<DatabaseError> for Failure {
    fn from(error: DatabaseError) -> Self {
        Self(peer_compute::room::database_problem(&error))
    }
}

/// The HTTP status for a code.
fn status_of(code: Code) -> StatusCode {
    match code.exit_status() {
        ExitStatus::Success => StatusCode::OK,
        ExitStatus::Usage => StatusCode::BAD_REQUEST,
        ExitStatus::NotFound => StatusCode::NOT_FOUND,
        ExitStatus::Refused if matches!(code, Code::PeerExists | Code::NameTaken | Code::IdentityExists) => {
            StatusCode::CONFLICT
        }
        ExitStatus::Refused => StatusCode::FORBIDDEN,
        ExitStatus::Unavailable => StatusCode::BAD_GATEWAY,
        ExitStatus::Busy => StatusCode::TOO_MANY_REQUESTS,
        ExitStatus::NotReady => StatusCode::CONFLICT,
        ExitStatus::Failed if code == Code::UnsupportedVersion => StatusCode::NOT_FOUND,
        ExitStatus::Failed => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// A body in JSON. What is wrong with one is told as a [`Problem`] that names the field.
#[derive(Debug)]
pub struct Payload<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Payload<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        let refuse = |reason: String| Failure(Problem::new(Code::InvalidArgument, reason));
        let media = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        if media.and_then(|media| media.split(';').next()).is_none_or(|media| media.trim() != "application/json") {
            return Err(refuse("the request's body must be application/json".into()));
        }
        let bytes = Bytes::from_request(request, state)
            .await
            .map_err(|error| refuse(format!("the request's body cannot be read: {error}")))?;
        let value = serde_json::from_slice(&bytes)
            .map_err(|error| refuse(format!("the request is not valid: {}", escape(&error.to_string()))));
        // It may hold a passphrase. What the HTTP library still refers to is out of reach.
        if let Ok(mut bytes) = bytes.try_into_mut() {
            bytes.as_mut().zeroize();
        }
        value.map(Self)
    }
}

/// Parameters of the query, with the same kind of refusal.
#[derive(Debug)]
pub struct Parameters<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Parameters<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Failure> {
        let refuse = |reason: String| {
            Failure(Problem::new(Code::InvalidArgument, format!("the request's query is not valid: {reason}")))
        };
        let Query(value) = Query::try_from_uri(&parts.uri).map_err(|error| refuse(escape(&error.body_text())))?;
        Ok(Self(value))
    }
}

/// An answer of JSON objects, one a line, each sent as soon as it is there.
pub fn ndjson<T, S>(objects: S) -> Response
where
    T: Serialize,
    S: Stream<Item = T> + Send + 'static,
{
    let lines = objects.map(|object| {
        let mut line = serde_json::to_vec(&object).map_err(io::Error::other)?;
        line.push(b'\n');
        Ok::<_, io::Error>(Bytes::from(line))
    });
    ([(header::CONTENT_TYPE, NDJSON)], Body::from_stream(lines)).into_response()
}

#[cfg(test)]
#[path = "api/tests.rs"]
mod tests;
