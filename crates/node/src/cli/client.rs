//! Speaks to the local daemon: HTTP/1.1 over its Unix socket, one connection for each request.
//!
//! Every answer is bounded in size and every wait in time, except where somebody follows a stream until Ctrl-C. An answer
//! that stops in its middle is a failure.

use std::io;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, UPGRADE};
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use peer_proto::code::{Code, Problem};
use peer_proto::control::{FORWARD_UPGRADE, REQUIRED_HEADER};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use zeroize::Zeroizing;

use super::failure::Failure;

/// Longest wait for the daemon to take a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Longest wait for the beginning of an answer; the daemon's own deadlines towards peers are shorter.
const ANSWER_DEADLINE: Duration = Duration::from_mins(2);
/// Longest silence within an answer that nobody follows; ending a container may take 300 seconds.
pub(super) const SILENCE_DEADLINE: Duration = Duration::from_mins(10);
/// Slowest upload that is waited for (bytes a second).
const UPLOAD_RATE_MIN: u64 = 16 * 1024;
/// Largest answer that is not a stream (bytes).
const ANSWER_MAX: usize = 64 << 20;
/// Longest object of a stream (bytes).
const LINE_MAX: usize = 32 << 20;

/// Body of a request.
pub(super) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// The local daemon, known by its socket.
#[derive(Debug, Clone)]
pub(super) struct Client {
    socket: PathBuf,
}

/// An answer with the task that drives its connection and ends with it.
#[derive(Debug)]
struct Answer {
    response: Response<Incoming>,
    connection: JoinSet<()>,
}

impl Client {
    /// The daemon that listens at `socket`. Nothing is opened yet.
    pub(super) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// `GET path`, answered by one object.
    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.object(self.ask(Method::GET, path, None::<&()>).await?).await
    }

    /// Any request with a JSON body, answered by one object.
    pub(super) async fn send<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &B,
    ) -> Result<T, Failure> {
        self.object(self.ask(method, path, Some(body)).await?).await
    }

    /// `DELETE path`, answered by one object.
    pub(super) async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.object(self.ask(Method::DELETE, path, None::<&()>).await?).await
    }

    /// Any request that is answered by a stream of objects, one a line.
    pub(super) async fn stream<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<Lines<T>, Failure> {
        Ok(Lines {
            bytes: self.bytes_of(self.ask(method, path, body).await?),
            buffer: Vec::new(),
            scanned: 0,
            item: PhantomData,
        })
    }

    /// `GET path`, answered by bytes.
    pub(super) async fn bytes(&self, path: &str) -> Result<ByteStream, Failure> {
        Ok(self.bytes_of(self.ask(Method::GET, path, None::<&()>).await?))
    }

    /// `PUT path` with a body of exactly `length` bytes.
    pub(super) async fn upload<T: DeserializeOwned>(&self, path: &str, length: u64, body: Body) -> Result<T, Failure> {
        let request = begin(Method::PUT, path).header(CONTENT_LENGTH, length);
        let deadline = SILENCE_DEADLINE.saturating_add(Duration::from_secs(length / UPLOAD_RATE_MIN));
        self.object(self.answer(complete(request, body)?, deadline).await?).await
    }

    /// `GET path` that becomes a raw connection in both directions.
    pub(super) async fn upgrade(&self, path: &str) -> Result<(TokioIo<Upgraded>, JoinSet<()>), Failure> {
        let request = begin(Method::GET, path).header(CONNECTION, "upgrade").header(UPGRADE, FORWARD_UPGRADE);
        let answer = self.answer(complete(request, no_body())?, ANSWER_DEADLINE).await?;
        if answer.response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(not_understood(&format!("status {} instead of an upgrade", answer.response.status())));
        }
        let upgraded = hyper::upgrade::on(answer.response).await.map_err(|error| self.stopped(&error.to_string()))?;
        Ok((TokioIo::new(upgraded), answer.connection))
    }

    async fn ask<B: Serialize>(&self, method: Method, path: &str, body: Option<&B>) -> Result<Answer, Failure> {
        let request = begin(method, path);
        let request = match body {
            None => complete(request, no_body())?,
            Some(body) => {
                let json = serde_json::to_vec(body)
                    .map_err(|error| Failure::new(Code::Internal, format!("the request cannot be written: {error}")))?;
                // It may hold a passphrase.
                let body =
                    Full::new(Bytes::from_owner(Zeroizing::new(json))).map_err(|never| match never {}).boxed_unsync();
                complete(request.header(CONTENT_TYPE, "application/json"), body)?
            }
        };
        self.answer(request, ANSWER_DEADLINE).await
    }

    /// Makes a request and waits for the head of its answer. An answer that reports a problem becomes that problem.
    async fn answer(&self, request: Request<Body>, deadline: Duration) -> Result<Answer, Failure> {
        let stream = self.connect().await?;
        let stopped = |error: hyper::Error| self.stopped(&error.to_string());
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(stopped)?;
        let mut driver = JoinSet::new();
        // What goes wrong here is told to the request and to its answer's body as well.
        driver.spawn(async move { drop(connection.with_upgrades().await) });
        let response = tokio::time::timeout(deadline, sender.send_request(request))
            .await
            .map_err(|_| Failure::new(Code::Timeout, format!("peerd has not answered within {deadline:?}; try again")))?
            .map_err(stopped)?;
        let answer = Answer { response, connection: driver };
        let status = answer.response.status();
        if status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(answer);
        }
        let body = self.collect(answer).await?;
        Err(match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => problem.into(),
            Err(_) => not_understood(&format!("status {status} without a reason")),
        })
    }

    async fn connect(&self) -> Result<UnixStream, Failure> {
        match tokio::time::timeout(CONNECT_DEADLINE, UnixStream::connect(&self.socket)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(unavailable(&self.socket, &error)),
            Err(_) => Err(unavailable(&self.socket, &io::ErrorKind::TimedOut.into())),
        }
    }

    async fn object<T: DeserializeOwned>(&self, answer: Answer) -> Result<T, Failure> {
        decode(&self.collect(answer).await?)
    }

    async fn collect(&self, answer: Answer) -> Result<Bytes, Failure> {
        let body = Limited::new(answer.response.into_body(), ANSWER_MAX).collect();
        let body = tokio::time::timeout(ANSWER_DEADLINE, body).await.map_err(|_| self.stopped("it fell silent"))?;
        Ok(body.map_err(|error| self.stopped(&error.to_string()))?.to_bytes())
    }

    fn bytes_of(&self, answer: Answer) -> ByteStream {
        ByteStream { client: self.clone(), body: answer.response.into_body(), _connection: answer.connection }
    }

    fn stopped(&self, why: &str) -> Failure {
        let socket = self.socket.display();
        Failure::new(
            Code::DaemonUnavailable,
            format!("peerd at {socket} stopped in the middle of its answer ({why}); look at its log and try again"),
        )
    }
}

/// An answer that arrives piece by piece.
#[derive(Debug)]
pub(super) struct ByteStream {
    client: Client,
    body: Incoming,
    _connection: JoinSet<()>,
}

impl ByteStream {
    /// The next piece; nothing once the answer is complete. Waits at most `silence`, for ever if there is none.
    pub(super) async fn next(&mut self, silence: Option<Duration>) -> Result<Option<Bytes>, Failure> {
        loop {
            let frame = match silence {
                None => self.body.frame().await,
                Some(limit) => tokio::time::timeout(limit, self.body.frame()).await.map_err(|_| {
                    Failure::new(Code::Timeout, format!("peerd has said nothing for {limit:?}; try again"))
                })?,
            };
            match frame.transpose().map_err(|error| self.client.stopped(&error.to_string()))? {
                None => return Ok(None),
                Some(frame) => {
                    // Frames that are not data are trailers, which nobody here sends.
                    if let Ok(bytes) = frame.into_data() {
                        return Ok(Some(bytes));
                    }
                }
            }
        }
    }
}

/// A stream of objects, one a line.
#[derive(Debug)]
pub(super) struct Lines<T> {
    bytes: ByteStream,
    buffer: Vec<u8>,
    scanned: usize,
    item: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Lines<T> {
    /// The next object; nothing once the answer is complete. Waits at most `silence`, for ever if there is none.
    ///
    /// Cancelling it loses nothing: what has arrived stays in the buffer.
    pub(super) async fn next(&mut self, silence: Option<Duration>) -> Result<Option<T>, Failure> {
        loop {
            if let Some(at) = self.buffer[self.scanned..].iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(self.scanned + at + 1);
                let line = std::mem::replace(&mut self.buffer, rest);
                self.scanned = 0;
                return decode(line.trim_ascii_end()).map(Some);
            }
            self.scanned = self.buffer.len();
            if self.buffer.len() > LINE_MAX {
                return Err(not_understood("an object beyond all measure"));
            }
            match self.bytes.next(silence).await? {
                Some(bytes) => self.buffer.extend_from_slice(&bytes),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(self.unfinished()),
            }
        }
    }

    /// The failure of a stream that ended before it said how the matter ended.
    pub(super) fn unfinished(&self) -> Failure {
        self.bytes.client.stopped("the stream ended early")
    }
}

/// Reads an object; a problem in its place becomes that problem.
fn decode<T: DeserializeOwned>(json: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(json).map_err(|error| match serde_json::from_slice::<Problem>(json) {
        Ok(problem) => problem.into(),
        Err(_) => not_understood(&error.to_string()),
    })
}

fn begin(method: Method, path: &str) -> hyper::http::request::Builder {
    Request::builder().method(method).uri(path).header(HOST, "localhost").header(REQUIRED_HEADER, "1")
}

fn complete(request: hyper::http::request::Builder, body: Body) -> Result<Request<Body>, Failure> {
    request.body(body).map_err(|error| Failure::new(Code::Internal, format!("the request cannot be made: {error}")))
}

fn no_body() -> Body {
    http_body_util::Empty::new().map_err(|never| match never {}).boxed_unsync()
}

fn not_understood(what: &str) -> Failure {
    let message = format!("peerd answered what this peerctl does not understand ({what}); are both of one version?");
    Failure::new(Code::UnsupportedVersion, message)
}

fn unavailable(socket: &Path, error: &io::Error) -> Failure {
    let socket = socket.display();
    let message = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            format!("peerd does not answer at {socket}: start it with `sudo peerd`, or name its socket with --socket")
        }
        io::ErrorKind::PermissionDenied => {
            format!("this user may not open {socket}: run peerctl as the user whom peerd serves, or with sudo")
        }
        _ => format!("peerd does not answer at {socket} ({error}): look at its log, or name its socket with --socket"),
    };
    Failure::new(Code::DaemonUnavailable, message)
}

/// Writes text so that it is one segment of a path or one value of a query (RFC 3986, unreserved characters stay).
pub(super) fn percent_encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_stay_one_segment() {
        assert_eq!(percent_encoded("web-1.a_b~"), "web-1.a_b~");
        assert_eq!(percent_encoded("../v1?x=#%ä"), "..%2Fv1%3Fx%3D%23%25%C3%A4");
    }

    #[test]
    fn a_problem_in_place_of_an_object_is_the_failure() {
        let failure = decode::<Vec<u8>>(br#"{"code":"no_identity","message":"run peerctl init"}"#).err();
        assert!(matches!(failure, Some(Failure::Problem(problem)) if problem.code == Code::NoIdentity));
        let failure = decode::<Vec<u8>>(b"{}").err();
        assert!(matches!(failure, Some(Failure::Problem(problem)) if problem.code == Code::UnsupportedVersion));
    }
}
