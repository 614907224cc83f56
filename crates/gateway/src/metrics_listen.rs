//! Serves the metrics on their loopback address: one path, one method, few connections.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::gateway::levels;
use crate::limits::Connections;
use crate::proxy::Proxy;

/// Connections at once; more wait to be accepted.
const CONNECTIONS_MAX: usize = 16;
/// Longest time for a request's head, and between two requests.
const HEAD_TIME: Duration = Duration::from_secs(10);
/// Longest life of a connection.
const CONNECTION_TIME: Duration = Duration::from_mins(5);
const PROMETHEUS_TEXT: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

/// Answers until dropped.
pub(crate) async fn serve(listener: TcpListener, proxy: Arc<Proxy>, connections: Arc<Connections>) {
    let mut open = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = open.join_next(), if !open.is_empty() => {}
            accepted = listener.accept(), if open.len() < CONNECTIONS_MAX => {
                let Ok((stream, _)) = accepted else {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                let (proxy, connections) = (Arc::clone(&proxy), Arc::clone(&connections));
                let service = service_fn(move |request| {
                    let response = answer(&request, &proxy, &connections);
                    async move { Ok::<_, Infallible>(response) }
                });
                let connection = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD_TIME)
                    .serve_connection(TokioIo::new(stream), service);
                open.spawn(async move { drop(tokio::time::timeout(CONNECTION_TIME, connection).await) });
            }
        }
    }
}

fn answer(request: &Request<Incoming>, proxy: &Proxy, connections: &Connections) -> Response<Full<Bytes>> {
    if request.uri().path() != "/metrics" || request.method() != Method::GET {
        return with_status(StatusCode::NOT_FOUND, "see /metrics\n".into());
    }
    match proxy.metrics.render(levels(proxy, connections)) {
        Ok(text) => {
            let mut response = with_status(StatusCode::OK, text);
            response.headers_mut().insert(CONTENT_TYPE, PROMETHEUS_TEXT);
            response
        }
        Err(error) => with_status(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn with_status(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response
}
