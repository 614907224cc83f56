//! Invitations, and joining with one.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use peer_proto::code::{Code, Problem};
use peer_proto::control::{Invitation, Invite, Join, Joined};
use peer_proto::text::escape;
use peer_trust::peers::InvitationRecord;
use peer_trust::trust::Snapshot;

use super::peers::{check_grants, describe};
use super::{Failure, Payload, to_the_end};
use crate::clock;
use crate::daemon::Daemon;
use crate::introduction::{self, Parts, until};

/// Letters of an id that are enough to name an invitation, if it is the only one.
const PREFIX_MIN: usize = 4;

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new()
        .route("/v1/invitations", get(list).post(invite))
        .route("/v1/invitations/{id}", delete(revoke))
        .route("/v1/join", post(join))
}

async fn list(State(daemon): State<Arc<Daemon>>) -> Json<Vec<Invitation>> {
    let now = clock::now();
    let list = daemon.trust.snapshot();
    let open = list.invitations.values().filter(|open| now < open.expires_at);
    Json(open.cloned().map(without_ticket).collect())
}

fn without_ticket(record: InvitationRecord) -> Invitation {
    Invitation { id: record.ticket.to_string(), ticket: None, expires_at: record.expires_at, grants: record.grants }
}

async fn invite(
    State(daemon): State<Arc<Daemon>>,
    Payload(request): Payload<Invite>,
) -> Result<Json<Invitation>, Failure> {
    let node = daemon.node().await?;
    check_grants(&request.grants, clock::now())?;
    let owned = daemon.clone();
    let work = async move { Ok(introduction::invite(Parts::of(&owned, &node), node.card(&owned), request).await?) };
    to_the_end(&daemon, work).await.map(Json)
}

async fn revoke(State(daemon): State<Arc<Daemon>>, Path(id): Path<String>) -> Result<Json<Invitation>, Failure> {
    let found = find(&daemon.trust.snapshot(), &id)?.ticket;
    let record = daemon.trust.revoke(found, clock::now()).await?;
    if let Ok(node) = daemon.node().await {
        until(&node.network, found, false).await;
    }
    Ok(Json(without_ticket(record)))
}

fn find<'a>(list: &'a Snapshot, id: &str) -> Result<&'a InvitationRecord, Problem> {
    let fits = |open: &&InvitationRecord| {
        let ticket = open.ticket.to_string();
        ticket == id || (id.len() >= PREFIX_MIN && (ticket.starts_with(id) || ticket.ends_with(id)))
    };
    let mut found = list.invitations.values().filter(fits);
    match (found.next(), found.next()) {
        (Some(open), None) => Ok(open),
        (Some(_), Some(_)) => {
            let message = format!("'{}' fits more than one invitation; write more of its id", escape(id));
            Err(Problem::new(Code::Ambiguous, message))
        }
        (None, _) => {
            let message = format!("there is no open invitation '{}'; `peerctl invite list` shows them", escape(id));
            Err(Problem::new(Code::InvalidTicket, message))
        }
    }
}

async fn join(State(daemon): State<Arc<Daemon>>, Payload(request): Payload<Join>) -> Result<Json<Joined>, Failure> {
    let node = daemon.node().await?;
    node.requester.check_open()?;
    check_grants(&request.grants, clock::now())?;
    let owned = daemon.clone();
    // Once the inviter has been reached, stopping half-way would leave trust on one side alone.
    let work = async move {
        let (record, granted) = introduction::join(Parts::of(&owned, &node), node.card(&owned), request).await?;
        Ok(Joined { peer: describe(&node, &record), granted })
    };
    to_the_end(&daemon, work).await.map(Json)
}
