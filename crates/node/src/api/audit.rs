//! The audit log.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use data_encoding::HEXLOWER_PERMISSIVE;
use peer_proto::code::{Code, Problem};
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

#[derive(Deserialize)]
struct Noted {
    /// Head that was shown earlier, in hexadecimal.
    head: Option<String>,
}

async fn verify(
    State(daemon): State<Arc<Daemon>>,
    Parameters(Noted { head }): Parameters<Noted>,
) -> Result<Json<AuditVerdict>, Failure> {
    let noted = head.as_deref().map(parse_head).transpose()?;
    Ok(Json(daemon.database.write(move |tx| audit::verify(tx, noted)).await?))
}

fn parse_head(text: &str) -> Result<[u8; 32], Problem> {
    let bytes = HEXLOWER_PERMISSIVE.decode(text.as_bytes()).ok().and_then(|bytes| bytes.try_into().ok());
    bytes.ok_or_else(|| {
        let message = "head: it must be 64 hexadecimal digits, as `peerctl audit verify` prints them";
        Problem::new(Code::InvalidArgument, message)
    })
}
