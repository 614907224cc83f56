//! What others may use of this machine: shown with what they hold, and changed while the daemon runs.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use peer_proto::limits::{BANDWIDTH_MIN, Bounds, ChangeLimits, LimitKey, LimitLine, LimitsReport, PeerLimits};
use peer_proto::unit::{ByteSize, Millicores};
use peer_state::database::DatabaseError;
use peer_trust::authorise::Held;
use peer_trust::limits;
use peer_trust::peers::PeerRecord;
use serde::Deserialize;

use super::{Failure, Parameters, Payload, to_the_end};
use crate::clock;
use crate::daemon::Daemon;

/// Where a limit comes from that was set by `peerctl limits set`.
const BY_LIMITS: &str = "limits";
/// Where a limit of a peer comes from.
const BY_GRANT: &str = "grant";
/// Where no limit comes from.
const NOWHERE: &str = "default";

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new().route("/v1/limits", get(show).patch(change))
}

#[derive(Deserialize)]
struct Whose {
    peer: Option<String>,
}

async fn show(
    State(daemon): State<Arc<Daemon>>,
    Parameters(Whose { peer }): Parameters<Whose>,
) -> Result<Json<LimitsReport>, Failure> {
    let peer = peer.map(|text| daemon.trust.snapshot().find(&text).map(|record| record.peer)).transpose()?;
    Ok(Json(report(&daemon, peer).await?))
}

async fn change(
    State(daemon): State<Arc<Daemon>>,
    Payload(request): Payload<ChangeLimits>,
) -> Result<Json<LimitsReport>, Failure> {
    check(&request.set)?;
    to_the_end(&daemon, changed(daemon.clone(), request)).await.map(Json)
}

async fn changed(daemon: Arc<Daemon>, request: ChangeLimits) -> Result<LimitsReport, Failure> {
    let peer = match &request.peer {
        None => {
            let bounds = daemon.database.write(move |tx| limits::change(tx, &request, clock::now())).await?;
            daemon.bandwidth.set_machine(bounds.bandwidth);
            None
        }
        Some(text) => {
            let peer = daemon.trust.snapshot().find(text)?.peer;
            daemon.trust.bound(peer, request.set, request.unset, clock::now()).await?;
            Some(peer)
        }
    };
    if let Ok(node) = daemon.node().await
        && let Some(room) = &node.room
    {
        room.wake_all();
    }
    report(&daemon, peer).await
}

/// Refuses limits under which nothing could work.
pub(super) fn check(set: &Bounds) -> Result<(), Problem> {
    let refuse = |message: String| Err(Problem::new(Code::InvalidArgument, message));
    if set.bandwidth.is_some_and(|bandwidth| bandwidth.get() < BANDWIDTH_MIN) {
        let least = peer_proto::unit::format_bytes(BANDWIDTH_MIN);
        return refuse(format!("bandwidth: at least {least} per second; below it transfers are given up for lost"));
    }
    if set.containers == Some(0) {
        return refuse("containers: at least 1; to let nothing run, use `peerctl pause`".to_owned());
    }
    Ok(())
}

async fn report(daemon: &Daemon, peer: Option<PeerId>) -> Result<LimitsReport, Failure> {
    let set = daemon.database.write(limits::load).await?;
    let (held, disk) = holding(daemon, None).await?;
    let machine = machine(daemon, &set, held, disk);
    let list = daemon.trust.snapshot();
    let mut peers = Vec::new();
    for record in list.peers.values().filter(|record| peer.is_none_or(|peer| peer == record.peer)) {
        if let Some(bounds) = record.grants.deploy.as_ref().map(peer_proto::grant::DeployGrant::bounds) {
            peers.push(of_peer(daemon, record, &bounds).await?);
        }
    }
    peers.sort_by(|one, other| one.peer.cmp(&other.peer));
    Ok(LimitsReport { machine: if peer.is_none() { machine } else { Vec::new() }, peers })
}

async fn of_peer(daemon: &Daemon, record: &PeerRecord, bounds: &Bounds) -> Result<PeerLimits, DatabaseError> {
    let (held, disk) = holding(daemon, Some(record.peer)).await?;
    let any = daemon.settings.image_size_max.get().saturating_mul(peer_compute::fetch::IMAGES_PER_OWNER);
    let line = |key| {
        let line = line(key, bounds, held, disk, BY_GRANT);
        // What no grant bounds more closely, the settings bound for all.
        if key == LimitKey::Disk && line.limit.is_none() {
            with_limit(line, any, setting(daemon, "image_size_max"))
        } else {
            line
        }
    };
    let limits = LimitKey::ALL.into_iter().map(line).collect();
    Ok(PeerLimits { peer: record.name.to_string(), peer_id: record.peer.to_string(), limits })
}

fn machine(daemon: &Daemon, set: &Bounds, held: Held, disk: u64) -> Vec<LimitLine> {
    let offer = daemon.settings.offer;
    let line = |key| {
        let line = line(key, set, held, disk, BY_LIMITS);
        match key {
            LimitKey::Cpu if line.limit.is_none() => with_limit(line, offer.cpu, setting(daemon, "offer_cpu")),
            LimitKey::Memory if line.limit.is_none() => with_limit(line, offer.memory, setting(daemon, "offer_memory")),
            LimitKey::Containers if line.limit.is_none() => {
                with_limit(line, offer.containers.into(), setting(daemon, "offer_containers"))
            }
            _ => line,
        }
    };
    LimitKey::ALL.into_iter().map(line).collect()
}

/// One limit by what is set. `source` is told if it is set.
fn line(key: LimitKey, bounds: &Bounds, held: Held, disk: u64, source: &str) -> LimitLine {
    let (limit, held) = match key {
        LimitKey::Cpu => (bounds.cpu.map(Millicores::get).map(u64::from), Some(held.cpu)),
        LimitKey::Memory => (bounds.memory.map(ByteSize::get), Some(held.memory)),
        LimitKey::Containers => (bounds.containers.map(u64::from), Some(held.containers.into())),
        LimitKey::Disk => (bounds.disk.map(ByteSize::get), Some(disk)),
        LimitKey::Bandwidth => (bounds.bandwidth.map(ByteSize::get), None),
        LimitKey::Hours => (None, None),
    };
    let hours = bounds.hours.clone().filter(|_| key == LimitKey::Hours);
    let source = if limit.is_some() || hours.is_some() { source } else { NOWHERE }.to_owned();
    let line = LimitLine { key, limit: None, hours, held, over: None, source: source.clone() };
    match limit {
        Some(limit) => with_limit(line, limit, source),
        None => line,
    }
}

fn with_limit(line: LimitLine, limit: u64, source: String) -> LimitLine {
    let over = line.held.and_then(|held| held.checked_sub(limit)).filter(|over| *over > 0);
    LimitLine { limit: Some(limit), over, source, ..line }
}

/// Where the value of a setting comes from.
fn setting(daemon: &Daemon, key: &str) -> String {
    let found = daemon.settings.explain().iter().find(|setting| setting.key == key);
    found.map_or_else(|| NOWHERE.to_owned(), |setting| setting.source.clone())
}

async fn holding(daemon: &Daemon, owner: Option<PeerId>) -> Result<(Held, u64), DatabaseError> {
    match daemon.node().await {
        Ok(node) => match &node.room {
            Some(room) => room.holding(owner).await,
            None => Ok((Held::default(), 0)),
        },
        Err(_) => Ok((Held::default(), 0)),
    }
}
