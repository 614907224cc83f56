//! Version and identity.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json, Router};
use data_encoding::HEXLOWER;
use peer_proto::control::{
    ApplyStatement, FollowedStatement, IdentityState, InitReply, InitRequest, Revoke, Revoked, Rotate, Rotated, Seal,
    Sealed, Unlock, Unseal, Version, Whoami,
};

use super::{Failure, Payload, to_the_end};
use crate::daemon::Daemon;
use crate::node::Node;

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new()
        .route("/v1/version", get(version))
        .route("/v1/identity", get(show).post(init))
        .route("/v1/identity/state", get(state))
        .route("/v1/identity/seal", post(seal))
        .route("/v1/identity/unseal", post(unseal))
        .route("/v1/identity/unlock", post(unlock))
        .route("/v1/identity/rotate", post(rotate))
        .route("/v1/identity/give-up", post(give_up))
        .route("/v1/identity/revoke", post(revoke))
        .route("/v1/identity/statements", post(apply))
}

async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION").to_owned(), api: super::VERSION })
}

async fn init(
    State(daemon): State<Arc<Daemon>>,
    Payload(request): Payload<InitRequest>,
) -> Result<Json<InitReply>, Failure> {
    let work = {
        let daemon = daemon.clone();
        async move { Ok(daemon.init(request).await?) }
    };
    to_the_end(&daemon, work).await.map(Json)
}

async fn state(State(daemon): State<Arc<Daemon>>) -> Result<Json<IdentityState>, Failure> {
    Ok(Json(daemon.identity_state().await?))
}

async fn seal(State(daemon): State<Arc<Daemon>>, Payload(request): Payload<Seal>) -> Result<Json<Sealed>, Failure> {
    let work = {
        let daemon = daemon.clone();
        async move { Ok(daemon.set_seal(request).await?) }
    };
    to_the_end(&daemon, work).await.map(Json)
}

async fn unseal(State(daemon): State<Arc<Daemon>>, Payload(request): Payload<Unseal>) -> Result<Json<Sealed>, Failure> {
    let work = {
        let daemon = daemon.clone();
        async move { Ok(daemon.unseal(request).await?) }
    };
    to_the_end(&daemon, work).await.map(Json)
}

async fn unlock(
    State(daemon): State<Arc<Daemon>>,
    Payload(request): Payload<Unlock>,
) -> Result<Json<IdentityState>, Failure> {
    let work = {
        let daemon = daemon.clone();
        async move { Ok(daemon.unlock(request).await?) }
    };
    to_the_end(&daemon, work).await.map(Json)
}

async fn rotate(
    State(daemon): State<Arc<Daemon>>,
    Payload(request): Payload<Rotate>,
) -> Result<Json<Rotated>, Failure> {
    let work = {
        let daemon = daemon.clone();
        async move { Ok(daemon.rotate(request).await?) }
    };
    to_the_end(&daemon, work).await.map(Json)
}

async fn give_up(State(daemon): State<Arc<Daemon>>) -> Result<Json<IdentityState>, Failure> {
    let work = {
        let daemon = daemon.clone();
        async move { Ok(daemon.give_up_rotation().await?) }
    };
    to_the_end(&daemon, work).await.map(Json)
}

async fn revoke(
    State(daemon): State<Arc<Daemon>>,
    Payload(request): Payload<Revoke>,
) -> Result<Json<Revoked>, Failure> {
    let work = {
        let daemon = daemon.clone();
        async move { Ok(daemon.revoke(request).await?) }
    };
    to_the_end(&daemon, work).await.map(Json)
}

async fn apply(
    State(daemon): State<Arc<Daemon>>,
    Payload(request): Payload<ApplyStatement>,
) -> Result<Json<FollowedStatement>, Failure> {
    let work = {
        let daemon = daemon.clone();
        async move { Ok(daemon.apply_statement(request).await?) }
    };
    to_the_end(&daemon, work).await.map(Json)
}

async fn show(State(daemon): State<Arc<Daemon>>) -> Result<Json<Whoami>, Failure> {
    let node = daemon.node().await?;
    Ok(Json(whoami(&daemon, &node)))
}

/// This machine as its card says.
pub(super) fn whoami(daemon: &Daemon, node: &Node) -> Whoami {
    let card = node.card(daemon);
    Whoami {
        peer_id: card.card().peer.to_string(),
        name: card.card().name.clone(),
        addresses: card.card().addresses().map(ToString::to_string).collect(),
        recovery_key: HEXLOWER.encode(&card.card().recovery_key),
        card: card.to_string(),
    }
}
