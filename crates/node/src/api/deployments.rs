//! Deployments: ours on other machines, and, on request, those of others here.

mod reference;
mod streams;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, Query, State};
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, Router};
use data_encoding::BASE64;
use futures::stream::{self, Stream};
use peer_compute::room::database_problem;
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use peer_proto::control::{Deploy, Deployment, Deployments, Image, Progress, Unreachable};
use peer_proto::deploy::{DeployRequest, Event, ImageOffer, ImageSource, Request, Status};
use peer_proto::id::{DeploymentId, Digest, RequestHash};
use peer_proto::query::{Answer, Query as Read, Usage};
use serde::Deserialize;

use crate::api::{Failure, ndjson};
use crate::clock::now;
use crate::daemon::Daemon;
use crate::node::Node;
use crate::requester::{Conversation, Requester};

/// How long a peer may take to list our deployments, when all are asked.
const LIST_PATIENCE: Duration = Duration::from_secs(5);

/// The routes of this part.
pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new()
        .route("/v1/deployments", get(list).post(deploy))
        .route("/v1/deployments/{reference}", get(inspect).delete(remove))
        .route("/v1/deployments/{reference}/{verb}", post(change))
        .route("/v1/deployments/{reference}/stats", get(stats))
        .route("/v1/deployments/{reference}/logs", get(streams::logs))
        .route("/v1/deployments/{reference}/forward", get(streams::forward))
}

#[derive(Debug, Deserialize)]
struct ListQuery {
    peer: Option<String>,
    #[serde(default)]
    hosted: bool,
}

#[derive(Debug, Deserialize)]
struct OneQuery {
    peer: Option<String>,
    #[serde(default)]
    force: bool,
}

async fn list(State(daemon): State<Arc<Daemon>>, Query(query): Query<ListQuery>) -> Result<Json<Deployments>, Failure> {
    let node = daemon.node().await?;
    if query.hosted {
        return Ok(Json(hosted(&node).await?));
    }
    let trust = daemon.trust.snapshot();
    let remembered = node.requester.remembered().await?;
    let asked: Vec<PeerId> = match &query.peer {
        Some(text) => vec![trust.find(text)?.peer],
        None => trust.peers.keys().copied().collect(),
    };
    let answers = futures::future::join_all(asked.into_iter().map(|peer| {
        let node = node.clone();
        async move {
            let connected = matches!(node.network.connection_state(peer), peer_net::ConnectionState::Connected(_));
            let answer = tokio::time::timeout(LIST_PATIENCE, node.requester.list(peer)).await;
            let late = |_| Problem::new(Code::Timeout, "it did not answer in time");
            (peer, connected, answer.map_err(late).and_then(|answer| answer))
        }
    }))
    .await;
    let mut all = Deployments { deployments: Vec::new(), unreachable: Vec::new() };
    for (peer, connected, answer) in answers {
        match answer {
            Ok(statuses) => {
                all.deployments.extend(statuses.into_iter().map(|status| fresh(&node.requester, peer, status)));
            }
            Err(problem) => {
                let known: Vec<_> = remembered.iter().filter(|known| known.peer == peer).collect();
                // A friend who is away and runs nothing of ours is no news.
                if connected || !known.is_empty() || query.peer.is_some() {
                    all.unreachable.push(Unreachable { peer: node.requester.name_of(&peer), problem });
                }
                all.deployments.extend(known.into_iter().map(|known| Deployment {
                    peer_id: peer.to_string(),
                    peer: node.requester.name_of(&peer),
                    as_of: known.as_of,
                    reachable: false,
                    status: known.status.clone(),
                }));
            }
        }
    }
    all.deployments.sort_by_key(|deployment| (deployment.status.created_at, deployment.status.id));
    Ok(Json(all))
}

async fn hosted(node: &Node) -> Result<Deployments, Problem> {
    let Some(room) = &node.room else { return Ok(Deployments { deployments: Vec::new(), unreachable: Vec::new() }) };
    let statuses = room.all_statuses().await.map_err(|error| database_problem(&error))?;
    let deployments = statuses.into_iter().map(|(owner, status)| fresh(&node.requester, owner, status)).collect();
    Ok(Deployments { deployments, unreachable: Vec::new() })
}

fn fresh(requester: &Requester, peer: PeerId, status: Status) -> Deployment {
    Deployment { peer_id: peer.to_string(), peer: requester.name_of(&peer), as_of: now(), reachable: true, status }
}

async fn inspect(
    State(daemon): State<Arc<Daemon>>,
    Path(text): Path<String>,
    Query(query): Query<OneQuery>,
) -> Result<Json<Deployment>, Failure> {
    let node = daemon.node().await?;
    let (peer, id) = reference::resolve(&daemon, &node, &text, query.peer.as_deref()).await?;
    match node.requester.inspect(peer, id).await {
        Ok(status) => Ok(Json(fresh(&node.requester, peer, status))),
        Err(problem) if matches!(problem.code, Code::PeerOffline | Code::Timeout) => {
            let known = node.requester.remembered().await?.into_iter().find(|known| known.status.id == id);
            let known = known.ok_or(problem)?;
            let peer = node.requester.name_of(&known.peer);
            let (peer_id, as_of, status) = (known.peer.to_string(), known.as_of, known.status);
            Ok(Json(Deployment { peer_id, peer, as_of, reachable: false, status }))
        }
        Err(problem) => Err(problem.into()),
    }
}

async fn stats(
    State(daemon): State<Arc<Daemon>>,
    Path(text): Path<String>,
    Query(query): Query<OneQuery>,
) -> Result<Json<Usage>, Failure> {
    let node = daemon.node().await?;
    let (peer, id) = reference::resolve(&daemon, &node, &text, query.peer.as_deref()).await?;
    match node.requester.query(peer, Read::Stats(id)).await? {
        Answer::Stats(usage) => Ok(Json(usage)),
        _ => Err(Problem::new(Code::Malformed, "the peer answered something else than was asked").into()),
    }
}

async fn deploy(State(daemon): State<Arc<Daemon>>, Json(body): Json<Deploy>) -> Result<Response, Failure> {
    let node = daemon.node().await?;
    body.specification.check()?;
    let peer = daemon.trust.snapshot().find(&body.peer)?.peer;
    let image = source(body.image)?;
    let sizes = sizes(&image)?;
    let request = Request::Deploy(Box::new(DeployRequest { specification: body.specification, image }));
    let conversation = node.requester.request(peer, request).await?;
    Ok(ndjson(progress(node.requester.clone(), conversation, sizes)))
}

/// The image of a request in the form that is signed.
pub(super) fn source(image: Image) -> Result<ImageSource, Problem> {
    match image {
        Image::Registry(reference) => Ok(ImageSource::Registry(reference)),
        Image::Offered { configuration, layer_sizes } => {
            let configuration = BASE64.decode(configuration.as_bytes()).map_err(|error| {
                Problem::new(Code::InvalidArgument, format!("image configuration is not base64: {error}"))
            })?;
            Ok(ImageSource::Offered(ImageOffer { configuration, layer_sizes }))
        }
    }
}

/// The layers that may be wanted, with their sizes.
pub(super) fn sizes(image: &ImageSource) -> Result<HashMap<Digest, u64>, Problem> {
    let ImageSource::Offered(offer) = image else { return Ok(HashMap::new()) };
    let configuration = peer_compute::image::configuration::parse_offer(offer).map_err(|error| error.problem())?;
    Ok(configuration.layers.into_iter().zip(offer.layer_sizes.iter().copied()).collect())
}

async fn remove(
    State(daemon): State<Arc<Daemon>>,
    Path(text): Path<String>,
    Query(query): Query<OneQuery>,
) -> Result<Response, Failure> {
    let node = daemon.node().await?;
    let (peer, id) = reference::resolve(&daemon, &node, &text, query.peer.as_deref()).await?;
    if !query.force {
        let status = node.requester.inspect(peer, id).await?;
        if status.state.holds_share() {
            let name = &status.specification.name;
            let message = format!("'{name}' is {}; stop it first, or use --force", status.state);
            return Err(Problem::new(Code::WrongState, message).into());
        }
    }
    let conversation = node.requester.request(peer, Request::Remove(id)).await?;
    Ok(ndjson(progress(node.requester.clone(), conversation, HashMap::new())))
}

async fn change(
    State(daemon): State<Arc<Daemon>>,
    Path((text, verb)): Path<(String, String)>,
    Query(query): Query<OneQuery>,
) -> Result<Response, Failure> {
    let request: fn(DeploymentId) -> Request = match verb.as_str() {
        "stop" => Request::Stop,
        "start" => Request::Start,
        "restart" => Request::Restart,
        _ => return Err(Problem::new(Code::InvalidArgument, "a deployment can stop, start and restart").into()),
    };
    let node = daemon.node().await?;
    let (peer, id) = reference::resolve(&daemon, &node, &text, query.peer.as_deref()).await?;
    let conversation = node.requester.request(peer, request(id)).await?;
    Ok(ndjson(progress(node.requester.clone(), conversation, HashMap::new())))
}

/// Layers may be sent as long as the answer that wanted them is followed.
struct Following {
    requester: Requester,
    conversation: Conversation,
    sizes: HashMap<Digest, u64>,
}

impl Drop for Following {
    fn drop(&mut self) {
        self.requester.end_upload(self.conversation.hash());
    }
}

/// The answer of a provider as objects for the person's program.
pub(super) fn progress(
    requester: Requester,
    conversation: Conversation,
    sizes: HashMap<Digest, u64>,
) -> impl Stream<Item = Progress> + Send + 'static {
    let following = Following { requester, conversation, sizes };
    stream::unfold(following, |mut following| async move {
        let event = following.conversation.next().await?;
        let progress = match event.and_then(|event| following.describe(event)) {
            Ok(progress) => progress,
            Err(problem) => Progress::Failed(problem),
        };
        Some((progress, following))
    })
}

impl Following {
    fn describe(&mut self, event: Event) -> Result<Progress, Problem> {
        let peer = self.conversation.peer();
        let deployment = |status: Box<Status>| Box::new(fresh(&self.requester, peer, *status));
        Ok(match event {
            Event::Accepted(deployment) => Progress::Accepted { deployment },
            Event::Want(layers) => {
                let transfer: RequestHash = self.conversation.hash();
                self.requester.begin_upload(transfer, peer, std::mem::take(&mut self.sizes))?;
                Progress::Want { transfer, layers }
            }
            Event::Changed(status) => Progress::Changed { deployment: deployment(status) },
            Event::Done(status) => Progress::Done { deployment: deployment(status) },
            Event::Removed(deployment) => Progress::Removed { deployment },
            Event::Pushed(image) => Progress::Pushed { image },
            Event::Failed(refusal) => Progress::Failed(refusal.problem),
        })
    }
}
