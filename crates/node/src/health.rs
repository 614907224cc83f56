//! Health checks: a request to the one exposed port of a running deployment, made from outside the container.
//!
//! A check changes what its owner is told, and nothing else: what to do about it is the owner's decision.

use std::collections::HashMap;
use std::time::Duration;

use http_body_util::Empty;
use hyper::body::Bytes;
use hyper::{Request, header};
use hyper_util::rt::TokioIo;
use peer_compute::room::{Change, Endpoint, Room};
use peer_compute::runner::RunnerEngine;
use peer_proto::deploy::{Health, HealthCheck, State, Status};
use peer_proto::id::DeploymentId;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};

/// How long one check may take.
const CHECK_DEADLINE: Duration = Duration::from_secs(5);

/// Checks every running deployment that asks for it, until the room ends.
pub async fn check_all(room: Room<RunnerEngine>, mut changes: Receiver<Change>) {
    let mut tasks = JoinSet::new();
    let mut running: HashMap<DeploymentId, AbortHandle> = HashMap::new();
    loop {
        if let Ok(statuses) = room.all_statuses().await {
            let wanted: HashMap<_, _> = statuses.into_iter().filter_map(|(_, status)| check_of(status)).collect();
            running.retain(|id, task| {
                let stays = wanted.contains_key(id) && !task.is_finished();
                if !stays {
                    task.abort();
                }
                stays
            });
            for (id, check) in wanted {
                let room = room.clone();
                running.entry(id).or_insert_with(|| tasks.spawn(check_one(room, id, check)));
            }
        }
        tokio::select! {
            changed = changes.recv() => if changed == Err(RecvError::Closed) { return },
            Some(_) = tasks.join_next() => {}
        }
    }
}

fn check_of(status: Status) -> Option<(DeploymentId, HealthCheck)> {
    (status.state == State::Running).then_some((status.id, status.specification.health?))
}

async fn check_one(room: Room<RunnerEngine>, id: DeploymentId, check: HealthCheck) {
    let mut failures = 0_u32;
    loop {
        // Where it cannot be reached it does not run any more, and its task is about to be ended.
        let Some(endpoint) = room.endpoint(id) else { return };
        let health = if let Ok(true) = timeout(CHECK_DEADLINE, answers(&endpoint, &check.path)).await {
            failures = 0;
            Some(Health::Healthy)
        } else {
            failures = failures.saturating_add(1);
            (failures >= check.retries).then_some(Health::Unhealthy)
        };
        if let Some(health) = health
            && let Err(error) = room.set_health(id, Some(health)).await
        {
            tracing::error!(deployment = %id, %error, "a health check could not be noted");
        }
        sleep(Duration::from_secs(check.interval_seconds.into())).await;
    }
}

async fn answers(endpoint: &Endpoint, path: &str) -> bool {
    let Ok(stream) = endpoint.network.connect(endpoint.port, CHECK_DEADLINE).await else { return false };
    let Ok((mut sender, connection)) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await else {
        return false;
    };
    let request = Request::get(path).header(header::HOST, "localhost").body(Empty::<Bytes>::new());
    let Ok(request) = request else { return false };
    tokio::select! {
        answer = sender.send_request(request) => {
            answer.is_ok_and(|answer| (200..400).contains(&answer.status().as_u16()))
        }
        _ = connection => false,
    }
}
