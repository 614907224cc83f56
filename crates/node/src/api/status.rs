//! The machine in one answer, and its configuration.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use peer_compute::ledger;
use peer_net::Role;
use peer_proto::code::Code;
use peer_proto::control::{EngineStatus, NodeStatus, Setting};
use peer_proto::query::Capacity;
use peer_proto::unit::{ByteSize, Millicores};
use peer_state::database::DatabaseError;

use super::{Failure, gateways, identity, pause};
use crate::daemon::Daemon;
use crate::node::{Node, architecture};

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new().route("/v1/status", get(status)).route("/v1/configuration", get(configuration))
}

async fn configuration(State(daemon): State<Arc<Daemon>>) -> Json<Vec<Setting>> {
    Json(daemon.settings.explain().to_vec())
}

async fn status(State(daemon): State<Arc<Daemon>>) -> Result<Json<NodeStatus>, Failure> {
    let node = daemon.node().await;
    let locked = node.as_ref().is_err_and(|problem| problem.code == Code::Locked);
    let node = node.ok();
    let node = node.as_deref();
    let mut hosted = 0;
    let mut offered = all_free(&daemon).await?;
    let mut engine = None;
    if let Some(room) = node.and_then(|node| node.room.as_ref()) {
        let records = room.all().await?;
        hosted = count(records.iter().filter(|record| record.life.state().holds_share()).count());
        offered = room.offered(architecture()).await?;
        let egress_problem = room.wall().problem();
        engine = Some(match room.engine_facts().await {
            Ok(facts) => EngineStatus { available: true, version: Some(facts.version), problem: None, egress_problem },
            Err(error) => {
                EngineStatus { available: false, version: None, problem: Some(error.problem()), egress_problem }
            }
        });
    }
    Ok(Json(NodeStatus {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        identity: node.map(|node| identity::whoami(&daemon, node)),
        locked,
        started_at: daemon.started_at,
        peers: count(daemon.trust.snapshot().peers.len()),
        peers_connected: node.map_or(0, connected),
        gateways: gateways::describe_all(&daemon, node),
        engine,
        hosted,
        pauses: pause::in_force(&daemon).await?,
        offered,
    }))
}

fn connected(node: &Node) -> u32 {
    let connections = node.network.connections();
    let mut peers: Vec<_> = connections.iter().filter(|one| one.role == Role::Peer).map(|one| one.peer).collect();
    peers.sort_unstable();
    peers.dedup();
    count(peers.len())
}

/// What is offered where nothing runs yet; nothing, where there is no engine.
async fn all_free(daemon: &Daemon) -> Result<Capacity, DatabaseError> {
    let settings = daemon.settings.offer;
    let offer = daemon.database.write(move |tx| ledger::offer(tx, settings)).await?;
    let offer = daemon.settings.engine_socket.as_ref().map(|_| offer);
    let cpu = offer.and_then(|offer| u32::try_from(offer.cpu).ok());
    Ok(Capacity {
        granted: None,
        free_cpu: cpu.and_then(|cpu| Millicores::new(cpu).ok()),
        free_memory: offer.and_then(|offer| ByteSize::new(offer.memory).ok()),
        free_containers: offer.map_or(0, |offer| offer.containers),
        architecture: architecture().to_owned(),
        isolation: None,
    })
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
