//! The audit log.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use peer_proto::control::{AuditLine, AuditVerdict};
use peer_state::audit;
use serde::Deserialize;

use super::{Failure, Parameters};
use crate::daemon::Daemon;

/// Most lines in one answer.
const LINES_MAX: u32 = 10_000;
/// Lines in an answer if nobody says otherwise.
const LINES: u32 = 100;

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new().route("/v1/audit", get(newest)).route("/v1/audit/verify", get(verify))
}

#[derive(Deserialize)]
struct Limit {
    limit: Option<u32>,
}

async fn newest(
    State(daemon): State<Arc<Daemon>>,
    Parameters(Limit { limit }): Parameters<Limit>,
) -> Result<Json<Vec<AuditLine>>, Failure> {
    let limit = limit.unwrap_or(LINES).min(LINES_MAX);
    Ok(Json(daemon.database.write(move |tx| audit::newest(tx, limit)).await?))
}

async fn verify(State(daemon): State<Arc<Daemon>>) -> Result<Json<AuditVerdict>, Failure> {
    Ok(Json(daemon.database.write(audit::verify).await?))
}
