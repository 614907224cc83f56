//! Images: layers on their way to a peer, pushes, images of this machine's engine, and those that peers brought here.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::extract::{Path, Query, State};
use axum::response::Response;
use axum::routing::{get, put};
use axum::{Json, Router};
use futures::{AsyncReadExt, AsyncWrite, AsyncWriteExt, StreamExt, stream};
use peer_compute::engine::Engine;
use peer_compute::room::database_problem;
use peer_net::exchange::{Deadline, read_frame};
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use peer_proto::control::{HostedImage, LayerSent, Push};
use peer_proto::deploy::{ImageSource, LayerReply, Request};
use peer_proto::frame::CONTROL_FRAME_MAX;
use peer_proto::id::{Digest, RequestHash};
use serde::Deserialize;

use super::deployments::{progress, sizes, source};
use crate::api::{Failure, ndjson};
use crate::daemon::Daemon;
use crate::requester::{Requester, exchange_problem};

/// How long the provider may take until it wants a layer, and to check and store it once it has come.
const STORE_DEADLINE: Duration = Duration::from_hours(1);

/// The routes of this part.
pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new()
        .route("/v1/images", get(list).post(push))
        .route("/v1/images/export", get(export))
        .route("/v1/transfers/{transfer}/layers/{layer}", put(layer))
}

async fn list(State(daemon): State<Arc<Daemon>>) -> Result<Json<Vec<HostedImage>>, Failure> {
    let node = daemon.node().await?;
    let Some(room) = &node.room else { return Ok(Json(Vec::new())) };
    let images = room.images().await.map_err(|error| database_problem(&error))?;
    let describe = |image: peer_compute::possession::BroughtImage| HostedImage {
        digest: image.digest,
        size_bytes: image.size,
        brought_by: image.owners.iter().map(|owner| node.requester.name_of(owner)).collect(),
        used_by: image.used_by,
        last_used_at: image.last_used_at,
    };
    Ok(Json(images.into_iter().map(describe).collect()))
}

async fn push(State(daemon): State<Arc<Daemon>>, Json(body): Json<Push>) -> Result<Response, Failure> {
    let node = daemon.node().await?;
    let peer = daemon.trust.snapshot().find(&body.peer)?.peer;
    let source = source(body.image)?;
    let sizes = sizes(&source)?;
    let ImageSource::Offered(offer) = source else {
        return Err(Problem::new(
            Code::InvalidArgument,
            "a push sends an image that is here; nothing is to be fetched",
        )
        .into());
    };
    let conversation = node.requester.request(peer, Request::Push(offer)).await?;
    Ok(ndjson(progress(node.requester.clone(), conversation, sizes)))
}

#[derive(Debug, Deserialize)]
struct ExportQuery {
    name: String,
}

async fn export(State(daemon): State<Arc<Daemon>>, Query(query): Query<ExportQuery>) -> Result<Response, Failure> {
    let node = daemon.node().await?;
    let Some(room) = &node.room else {
        let message = "this machine uses no container engine; name an archive on disk instead (docker save -o FILE)";
        return Err(Problem::new(Code::EngineUnavailable, message).into());
    };
    let image = room.engine().resolve(&query.name).await.map_err(|error| error.problem())?;
    let mut pieces = room.engine().export(&image.to_string());
    // The first piece decides whether this is an image or a sentence.
    let first = pieces.next().await.transpose().map_err(|error| error.problem())?;
    let pieces = stream::iter(first.map(Ok)).chain(pieces);
    Ok(Response::new(Body::from_stream(pieces)))
}

async fn layer(
    State(daemon): State<Arc<Daemon>>,
    Path((transfer, layer)): Path<(RequestHash, Digest)>,
    body: Body,
) -> Result<Json<LayerSent>, Failure> {
    let node = daemon.node().await?;
    let (peer, stream, size) = node.requester.open_layer(transfer, layer).await?;
    let requester = &node.requester;
    let (mut reader, mut writer) = stream.split();
    // It may first wait for another request of ours that is sending the same layer.
    let offset = match read_frame(&mut reader, CONTROL_FRAME_MAX, Deadline::after(STORE_DEADLINE)).await {
        Ok(LayerReply::From(offset)) => offset,
        Ok(LayerReply::Refused(problem)) => return Err(requester.in_name_of(&peer, &problem).into()),
        Ok(LayerReply::Stored) => size,
        Err(error) => return Err(exchange_problem(&requester.name_of(&peer), &error).into()),
    };
    let verdict = read_frame(&mut reader, CONTROL_FRAME_MAX, Deadline::after(STORE_DEADLINE));
    let sending = send(requester, peer, body.into_data_stream(), (offset, size), &mut writer);
    tokio::pin!(verdict, sending);
    let verdict = tokio::select! {
        // A refusal may come before everything has been sent; then the rest need not travel.
        verdict = &mut verdict => {
            if matches!(verdict, Ok(LayerReply::Stored)) {
                // The peer has it all already. Our caller is still heard out, or it would see a broken connection.
                drop(sending.await);
            }
            verdict
        }
        sent = &mut sending => {
            sent?;
            verdict.await
        }
    };
    match verdict {
        Ok(LayerReply::Stored) => {
            let bytes_sent = size.saturating_sub(offset);
            daemon.metrics.layer_bytes_sent(bytes_sent);
            Ok(Json(LayerSent { digest: layer, bytes_sent }))
        }
        Ok(LayerReply::Refused(problem)) => Err(requester.in_name_of(&peer, &problem).into()),
        Ok(LayerReply::From(_)) => Err(Problem::new(Code::Malformed, "the peer answered out of turn").into()),
        Err(error) => Err(exchange_problem(&requester.name_of(&peer), &error).into()),
    }
}

/// Sends a layer of `size` bytes from `offset` on; what comes before has arrived at an earlier try.
async fn send(
    requester: &Requester,
    peer: PeerId,
    mut body: BodyDataStream,
    (offset, size): (u64, u64),
    writer: &mut (impl AsyncWrite + Unpin),
) -> Result<(), Problem> {
    let mut position = 0_u64;
    while let Some(piece) = body.next().await {
        let piece = piece.map_err(|error| {
            Problem::new(Code::MissingLayer, format!("the layer could not be read to its end: {error}"))
        })?;
        let begin = usize::try_from(offset.saturating_sub(position)).unwrap_or(usize::MAX).min(piece.len());
        position += piece.len() as u64;
        if position > size {
            return Err(Problem::new(Code::DigestMismatch, "the layer is longer than was offered"));
        }
        let written = writer.write_all(&piece[begin..]).await;
        written.map_err(|error| exchange_problem(&requester.name_of(&peer), &error.into()))?;
    }
    if position != size {
        return Err(Problem::new(Code::MissingLayer, "the layer is shorter than was offered"));
    }
    writer.flush().await.map_err(|error| exchange_problem(&requester.name_of(&peer), &error.into()))
}
