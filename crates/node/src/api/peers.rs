//! The trust list.

mod removal;

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::routing::get;
use axum::{Json, Router};
use multiaddr::Multiaddr;
use peer_net::{ConnectionInfo, ConnectionState, Direction, Traffic};
use peer_proto::card::{CARD_ADDRESSES_MAX, SignedCard};
use peer_proto::code::{Code, Problem};
use peer_proto::control::{AddPeer, ChangePeer, Connection, Peer, RemovedPeer};
use peer_proto::grant::Grants;
use peer_proto::identity::verification_code;
use peer_proto::text::escape;
use peer_proto::unit::Timestamp;
use peer_state::database::Tx;
use peer_trust::peers::PeerRecord;
use peer_trust::trust::Repeated;

use self::removal::Removal;
use super::{Failure, Parameters, Payload, to_the_end};
use crate::clock;
use crate::daemon::Daemon;
use crate::introduction::until;
use crate::node::Node;
use crate::settings::peer_address;
use crate::withdrawal;

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new()
        .route("/v1/peers", get(list).post(add))
        .route("/v1/peers/{peer}", get(show).patch(change).delete(remove))
}

async fn list(State(daemon): State<Arc<Daemon>>) -> Result<Json<Vec<Peer>>, Failure> {
    let node = daemon.node().await?;
    let mut peers: Vec<_> = daemon.trust.snapshot().peers.values().map(|record| describe(&node, record)).collect();
    peers.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(Json(peers))
}

async fn show(State(daemon): State<Arc<Daemon>>, Path(peer): Path<String>) -> Result<Json<Peer>, Failure> {
    let node = daemon.node().await?;
    Ok(Json(describe(&node, daemon.trust.snapshot().find(&peer)?)))
}

async fn add(State(daemon): State<Arc<Daemon>>, Payload(request): Payload<AddPeer>) -> Result<Json<Peer>, Failure> {
    to_the_end(&daemon, added(daemon.clone(), request)).await.map(Json)
}

async fn added(daemon: Arc<Daemon>, request: AddPeer) -> Result<Peer, Failure> {
    let node = daemon.node().await?;
    let card: SignedCard = request
        .card
        .parse()
        .map_err(|error| Problem::new(Code::InvalidArgument, format!("the card is not valid: {error}")))?;
    let peer = card.card().peer;
    if peer == node.identity.key.peer_id() {
        return Err(Problem::new(Code::InvalidArgument, "this is the card of this machine itself").into());
    }
    if daemon.gateways.list().iter().any(|gateway| gateway.peer == peer) {
        let message = "this is the card of a gateway in the list; a peer has a key of its own";
        return Err(Problem::new(Code::InvalidArgument, message).into());
    }
    let now = clock::now();
    check_grants(&request.grants, now)?;
    let record = daemon.trust.add(card, request.name, request.grants, Repeated::Refused, now).await?;
    until(&node.network, record.peer, true).await;
    let message = format!("'{}' was added", record.name);
    daemon.notices.push("peer_added", Some(record.peer.to_string()), None, message);
    Ok(describe(&node, &record))
}

async fn change(
    State(daemon): State<Arc<Daemon>>,
    Path(peer): Path<String>,
    Payload(request): Payload<ChangePeer>,
) -> Result<Json<Peer>, Failure> {
    to_the_end(&daemon, changed(daemon.clone(), peer, request)).await.map(Json)
}

async fn changed(daemon: Arc<Daemon>, peer: String, request: ChangePeer) -> Result<Peer, Failure> {
    let node = daemon.node().await?;
    let found = daemon.trust.snapshot().find(&peer)?.peer;
    let now = clock::now();
    if let Some(grants) = &request.grants {
        check_grants(grants, now)?;
    }
    let addresses = request.addresses.as_deref().map(parse_addresses).transpose()?;
    let (keep, changes_grants) = (request.keep_deployments, request.grants.is_some());
    let and = move |tx: &Tx<'_>| {
        if changes_grants { withdrawal::after_change(tx, &found, keep, now) } else { Ok((Vec::new(), String::new())) }
    };
    let (record, stopped) = daemon.trust.update(found, request.name, request.grants, addresses, now, and).await?;
    withdrawal::go_on(&node, &stopped);
    Ok(describe(&node, &record))
}

async fn remove(
    State(daemon): State<Arc<Daemon>>,
    Path(peer): Path<String>,
    Parameters(removal): Parameters<Removal>,
) -> Result<Json<RemovedPeer>, Failure> {
    to_the_end(&daemon, removal::remove(daemon.clone(), peer, removal)).await.map(Json)
}

/// A grant that could never allow anything is a mistake.
pub(super) fn check_grants(grants: &Grants, now: Timestamp) -> Result<(), Problem> {
    let Some(deploy) = &grants.deploy else { return Ok(()) };
    if deploy.max_containers == 0 {
        return Err(Problem::new(Code::InvalidArgument, "max_containers must be at least 1"));
    }
    if !deploy.is_live(now) {
        return Err(Problem::new(Code::InvalidArgument, "expires_at lies in the past"));
    }
    super::limits::check(&deploy.bounds())?;
    Ok(())
}

fn parse_addresses(texts: &[String]) -> Result<Vec<Multiaddr>, Problem> {
    if texts.len() > CARD_ADDRESSES_MAX {
        let message = format!("addresses: at most {CARD_ADDRESSES_MAX} are accepted");
        return Err(Problem::new(Code::InvalidArgument, message));
    }
    let parse = |text: &String| {
        peer_address(text).ok_or_else(|| {
            let message = format!("addresses: '{}' is not of the form /ip4/192.0.2.1/tcp/4100", escape(text));
            Problem::new(Code::InvalidArgument, message)
        })
    };
    texts.iter().map(parse).collect()
}

/// A peer with how we stand with it at this moment.
pub(super) fn describe(node: &Node, record: &PeerRecord) -> Peer {
    let (connection, last_error) = match node.network.connection_state(record.peer) {
        ConnectionState::Connected(connections) => (shown(&connections), None),
        ConnectionState::Offline { last_error } => (None, last_error),
        ConnectionState::NotAdmitted => (None, None),
    };
    Peer {
        peer_id: record.peer.to_string(),
        name: record.name.clone(),
        grants: record.grants.clone(),
        addresses: record.addresses().iter().map(ToString::to_string).collect(),
        added_at: record.added_at,
        verification_code: verification_code(&node.identity.key.peer_id(), &record.peer),
        connection,
        last_error,
    }
}

/// Of two connections the one that requests travel on.
fn shown(connections: &[ConnectionInfo]) -> Option<Connection> {
    let control = connections.iter().find(|connection| connection.traffic == Traffic::Control);
    let connection = control.or(connections.first())?;
    let age = u64::try_from(connection.since.elapsed().as_millis()).unwrap_or(u64::MAX);
    let round_trip = connection.round_trip.map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    // The PeerId stands beside it already.
    let address = connection.address.iter().filter(|part| !matches!(part, multiaddr::Protocol::P2p(_)));
    Some(Connection {
        address: address.collect::<multiaddr::Multiaddr>().to_string(),
        outbound: connection.direction == Direction::Outbound,
        since: Timestamp(clock::now().0.saturating_sub(age)),
        round_trip_microseconds: round_trip,
    })
}
