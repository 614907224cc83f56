//! The gateways that this machine serves through.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::routing::{delete, get};
use axum::{Json, Router};
use peer_net::ConnectionState;
use peer_proto::control::{AddGateway, Gateway};

use super::{Failure, Payload};
use crate::clock;
use crate::daemon::Daemon;
use crate::gateways::{GatewayError, GatewayRecord, parse_pinned};
use crate::node::Node;

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new().route("/v1/gateways", get(list).post(add)).route("/v1/gateways/{gateway}", delete(remove))
}

async fn list(State(daemon): State<Arc<Daemon>>) -> Json<Vec<Gateway>> {
    Json(describe_all(&daemon, daemon.node().await.ok().as_deref()))
}

async fn add(
    State(daemon): State<Arc<Daemon>>,
    Payload(request): Payload<AddGateway>,
) -> Result<Json<Gateway>, Failure> {
    let node = daemon.node().await.ok();
    let (_, peer) = parse_pinned(&request.address)?;
    if node.as_ref().is_some_and(|node| node.identity.key.peer_id() == peer) {
        return Err(GatewayError::Own.into());
    }
    if daemon.trust.snapshot().peers.contains_key(&peer) {
        return Err(GatewayError::Peer.into());
    }
    let record = daemon.gateways.add(&request.address, clock::now()).await?;
    Ok(Json(describe(node.as_deref(), &record)))
}

async fn remove(State(daemon): State<Arc<Daemon>>, Path(gateway): Path<String>) -> Result<Json<Gateway>, Failure> {
    // The change itself comes to its end without us; what follows is only waiting for the gate.
    let record = daemon.gateways.remove(&gateway, clock::now()).await?;
    if let Ok(node) = daemon.node().await {
        crate::introduction::until(&node.network, record.peer, false).await;
    }
    Ok(Json(describe(None, &record)))
}

/// Every gateway with how its tunnel stands.
pub(super) fn describe_all(daemon: &Daemon, node: Option<&Node>) -> Vec<Gateway> {
    daemon.gateways.list().iter().map(|record| describe(node, record)).collect()
}

fn describe(node: Option<&Node>, record: &GatewayRecord) -> Gateway {
    let (tunnel, leases) = node.map(|node| node.ingress.tunnel(&record.peer)).unwrap_or_default();
    let offline = || match node?.network.connection_state(record.peer) {
        ConnectionState::Offline { last_error } => last_error,
        ConnectionState::NotAdmitted | ConnectionState::Connected(_) => None,
    };
    Gateway {
        peer_id: record.peer.to_string(),
        address: record.pinned_address(),
        connected: tunnel.connected,
        leases,
        last_error: if tunnel.connected { None } else { tunnel.last_error.or_else(offline) },
    }
}
