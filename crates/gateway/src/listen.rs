//! The door for visitors: accepts connections within limits, secures them, and serves their requests one after another.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::limits::{ConnectionSlot, Connections};
use crate::proxy::{Proxy, Visitor};
use crate::strict::{FIELDS_MAX, HEAD_BYTES_MAX};
use crate::visitor_io::{Conversation, VisitorIo, Waits};

/// Longest time for the TLS handshake.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// Pause after a failure to accept, such as too many open files.
const FAILURE_PAUSE: Duration = Duration::from_millis(100);

/// What every connection needs.
#[derive(Clone)]
pub struct Door {
    /// Terminates TLS.
    pub acceptor: TlsAcceptor,
    /// Answers requests.
    pub proxy: Arc<Proxy>,
    /// Counts connections.
    pub connections: Arc<Connections>,
    /// Longest waits on a visitor.
    pub waits: Waits,
    /// Owner of the connections' tasks.
    pub tasks: TaskTracker,
    /// Cancelled when no further request is to be accepted.
    pub stop: CancellationToken,
    /// Cancelled when nothing is waited for any more.
    pub kill: CancellationToken,
}

impl std::fmt::Debug for Door {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Door").field("connections", &self.connections).finish_non_exhaustive()
    }
}

/// Accepts visitors until the gateway stops.
pub async fn serve(listener: TcpListener, door: Door) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = door.stop.cancelled() => return,
        };
        match accepted {
            Ok((stream, address)) => match door.connections.admit(address.ip()) {
                Some(slot) => {
                    let kill = door.kill.clone();
                    let connection = serve_connection(stream, address, slot, door.clone());
                    door.tasks.spawn(kill.run_until_cancelled_owned(connection));
                }
                None => door.proxy.metrics.count_refused_connection("limit"),
            },
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(FAILURE_PAUSE).await;
            }
        }
    }
}

async fn serve_connection(stream: TcpStream, address: SocketAddr, slot: ConnectionSlot, door: Door) {
    let metrics = Arc::clone(&door.proxy.metrics);
    let handshake = async {
        stream.set_nodelay(true)?;
        door.acceptor.accept(stream).await
    };
    let secured = match tokio::time::timeout(HANDSHAKE_TIME, handshake).await {
        Ok(Ok(secured)) => secured,
        Ok(Err(error)) => {
            tracing::debug!(%address, %error, "handshake failed");
            return metrics.count_refused_connection("handshake_failed");
        }
        Err(_) => return metrics.count_refused_connection("handshake_timed_out"),
    };
    let conversation = Conversation::default();
    let visitor = Visitor {
        address: address.ip().to_canonical(),
        server_name: secured.get_ref().1.server_name().map(Arc::from),
        conversation: conversation.clone(),
        connection_slot: Arc::new(slot),
    };
    if let Err(error) = serve_requests(VisitorIo::new(secured, conversation, door.waits), visitor, &door).await {
        tracing::debug!(%address, %error, "connection ended");
    }
}

async fn serve_requests<S>(io: VisitorIo<S>, visitor: Visitor, door: &Door) -> Result<(), hyper::Error>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let service =
        service_fn(|request: http::Request<Incoming>| Arc::clone(&door.proxy).answer(visitor.clone(), request));
    // The waits and the sizes are enforced by `VisitorIo`; the library's own stand a little behind them.
    let connection = http1::Builder::new()
        .half_close(false)
        .header_read_timeout(None)
        .max_headers(2 * FIELDS_MAX)
        .max_buf_size(2 * HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(io), service)
        .with_upgrades();
    let mut connection = pin!(connection);
    tokio::select! {
        outcome = &mut connection => return outcome,
        () = door.stop.cancelled() => {}
    }
    connection.as_mut().graceful_shutdown();
    connection.await
}

/// Binds the door's address; the error names it.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")))
}
