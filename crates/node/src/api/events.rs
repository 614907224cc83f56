//! What happens: events, and metrics.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::stream;
use peer_proto::control::Notice;
use peer_state::audit;
use serde::Deserialize;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

use super::{Failure, Parameters, ndjson};
use crate::daemon::Daemon;
use crate::metrics;

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new().route("/v1/events", get(events)).route("/metrics", get(metrics))
}

#[derive(Deserialize)]
struct Following {
    #[serde(default)]
    follow: bool,
}

/// Without `follow` the last events, and with it those from now on.
async fn events(
    State(daemon): State<Arc<Daemon>>,
    Parameters(Following { follow }): Parameters<Following>,
) -> Response {
    if follow {
        ndjson(stream::unfold(daemon.notices.subscribe(), next))
    } else {
        ndjson(stream::iter(daemon.notices.recent()))
    }
}

/// A listener that is too slow misses the oldest.
async fn next(mut receiver: Receiver<Notice>) -> Option<(Notice, Receiver<Notice>)> {
    loop {
        match receiver.recv().await {
            Ok(notice) => return Some((notice, receiver)),
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return None,
        }
    }
}

pub(super) async fn metrics(State(daemon): State<Arc<Daemon>>) -> Result<Response, Failure> {
    if let Ok(node) = daemon.node().await {
        daemon.metrics.observe_network(&node.network.counters(), node.network.connections().len());
        if let Some(room) = &node.room {
            let records = room.all().await?;
            daemon.metrics.observe_deployments(records.iter().map(|record| record.life.state()));
        }
    }
    let newest = daemon.database.write(|tx| audit::newest(tx, 1)).await?;
    daemon.metrics.observe_audit(newest.last().map_or(0, |line| line.sequence));
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], daemon.metrics.text()).into_response())
}
