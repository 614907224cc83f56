//! The emergency stop.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::post;
use axum::{Json, Router};
use peer_proto::panic::PanicReport;

use super::{Failure, to_the_end};
use crate::daemon::Daemon;
use crate::emergency;

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new().route("/v1/panic", post(panic))
}

async fn panic(State(daemon): State<Arc<Daemon>>) -> Result<Json<PanicReport>, Failure> {
    let owned = daemon.clone();
    to_the_end(&daemon, async move { Ok(emergency::panic(&owned).await) }).await.map(Json)
}
