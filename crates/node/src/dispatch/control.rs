//! The control protocol, provider's side: hello, one call, and its answer.

use std::sync::Arc;
use std::time::Duration;

use futures::AsyncReadExt;
use peer_compute::record::Record;
use peer_compute::room::{Change, Room, database_problem};
use peer_compute::runner::RunnerEngine;
use peer_net::exchange::{Deadline, ExchangeError, read_frame_within, write_frame, write_frame_bytes};
use peer_net::{InboundStream, Stream};
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem, Threat};
use peer_proto::deploy::{Event, ImageSource, Refusal as Told, Reply, Request, State, Status};
use peer_proto::envelope::{self, Signed};
use peer_proto::frame::CONTROL_FRAME_MAX;
use peer_proto::id::{DeploymentId, RequestHash};
use peer_proto::query::{Answer, Call, Hello, Query};
use peer_proto::statement::Statement;
use peer_state::audit::{self, Entry, Outcome};
use peer_state::database::DatabaseError;
use peer_trust::authorise::authorise;
use peer_trust::follow::Bearer;
use peer_trust::refusal::Refusal;
use peer_trust::replay;
use tokio::sync::broadcast::{Receiver, error::RecvError};

use crate::clock::now;
use crate::daemon::Daemon;
use crate::ingress::Ingress;
use crate::node::Node;
use crate::{statements, withdrawal};

use super::streams::withdrawn;

/// How long the requester may take for its call, and for taking one frame of the answer.
const FRAME_DEADLINE: Duration = Duration::from_secs(20);
/// How long an answer waits for a gateway to give a public address, or to take it back.
const LEASE_PATIENCE: Duration = Duration::from_secs(5);

pub(super) async fn serve(daemon: &Arc<Daemon>, node: &Arc<Node>, inbound: InboundStream) -> Result<(), ExchangeError> {
    let (peer, mut stream) = (inbound.peer, inbound.stream);
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let hello = Hello { incarnation: daemon.run.incarnation(), clock: now(), version };
    write_frame(&mut stream, &hello, CONTROL_FRAME_MAX, Deadline::after(FRAME_DEADLINE)).await?;
    let share = daemon.quotas.of(peer);
    let deadline = Deadline::after(FRAME_DEADLINE);
    let (call, _reserved) = read_frame_within(&mut stream, CONTROL_FRAME_MAX, deadline, &share.frames).await?;
    match call {
        Call::Query(query) => {
            if let Err(problem) = share.query() {
                return refuse_call(daemon, &mut stream, peer, "read", problem).await;
            }
            // Held until the answer is gone: what is not taken off our hands fills nobody else's memory.
            let _turn = share.work().await;
            let answer = answer(daemon, node, peer, query).await.unwrap_or_else(Answer::Problem);
            write_frame(&mut stream, &answer, CONTROL_FRAME_MAX, Deadline::after(FRAME_DEADLINE)).await
        }
        Call::Offer(offers) => {
            if let Err(problem) = share.query() {
                return refuse_call(daemon, &mut stream, peer, "offer", problem).await;
            }
            let _turn = share.work().await;
            let answer = statements::wanted(daemon, node, &offers).await.map_or_else(Answer::Problem, Answer::Wanted);
            write_frame(&mut stream, &answer, CONTROL_FRAME_MAX, Deadline::after(FRAME_DEADLINE)).await
        }
        Call::Statement(bytes) => {
            if let Err(problem) = share.request() {
                return refuse_call(daemon, &mut stream, peer, "statement", problem).await;
            }
            let answer = statement(daemon, node, peer, &bytes).await;
            write_frame(&mut stream, &answer, CONTROL_FRAME_MAX, Deadline::after(FRAME_DEADLINE)).await
        }
        Call::Signed(bytes) => {
            // Bytes that are no envelope cannot even be answered in a way that the requester could check.
            let Some(hash) = envelope::hash_of_bytes(&bytes) else {
                refuse_unread(daemon, peer, "bytes that are no envelope").await;
                return Ok(());
            };
            let mut replies = Replies { node, stream, peer, hash, sequence: 0 };
            if let Err(problem) = share.request() {
                record_refusal(daemon, peer, "request", Threat::V5, &problem).await;
                return replies.fail(problem, None).await;
            }
            request(daemon, node, &mut replies, bytes).await
        }
    }
}

/// Answers a call that came too fast.
async fn refuse_call(
    daemon: &Daemon,
    stream: &mut Stream,
    peer: PeerId,
    action: &str,
    problem: Problem,
) -> Result<(), ExchangeError> {
    record_refusal(daemon, peer, action, Threat::V5, &problem).await;
    write_frame(stream, &Answer::Problem(problem), CONTROL_FRAME_MAX, Deadline::after(FRAME_DEADLINE)).await
}

/// Carries out what a peer tells about a key, in a task of the daemon's: the connection may be that of the key which ends.
async fn statement(daemon: &Arc<Daemon>, node: &Arc<Node>, peer: PeerId, bytes: &[u8]) -> Answer {
    let statement = match Statement::decode(bytes) {
        Ok(statement) => statement,
        Err(error) => {
            let problem = Problem::new(Code::InvalidSignature, error.to_string());
            record_refusal(daemon, peer, "statement", Threat::V2, &problem).await;
            return Answer::Problem(problem);
        }
    };
    let work = {
        let (daemon, node) = (daemon.clone(), node.clone());
        async move { statements::take(&daemon, &node, statement, Bearer::Peer(peer)).await }
    };
    match daemon.tasks.spawn(work).await {
        Ok(Ok(_)) => Answer::Followed,
        Ok(Err(problem)) => {
            daemon.metrics.refused(problem.code);
            Answer::Problem(problem)
        }
        Err(_) => Answer::Problem(Problem::new(Code::ShuttingDown, "the daemon is shutting down")),
    }
}

async fn refuse_unread(daemon: &Daemon, peer: PeerId, detail: &str) {
    let problem = Problem::new(Code::Malformed, detail);
    record_refusal(daemon, peer, "request", Threat::V2, &problem).await;
}

/// Counts a refusal that came before the one decision could be made, and audits the first of its kind.
async fn record_refusal(daemon: &Daemon, peer: PeerId, action: &str, threat: Threat, problem: &Problem) {
    daemon.metrics.refused(problem.code);
    let message = format!("{action} refused: {problem}");
    if !daemon.refused.is_first(peer, problem.code, threat, &message) {
        return;
    }
    daemon.notices.push("request_refused", Some(peer.to_string()), None, message);
    let entry = Entry {
        at: now(),
        actor: peer.to_string(),
        action: action.to_owned(),
        outcome: Outcome::Refused(threat),
        detail: problem.message.clone(),
    };
    if let Err(error) = daemon.database.write(move |tx| audit::append(tx, &entry)).await {
        daemon.refused.forget(peer);
        tracing::error!(%error, "a refusal could not be audited");
    }
}

/// Writes the signed lines of one answer.
struct Replies<'a> {
    node: &'a Node,
    stream: Stream,
    peer: PeerId,
    hash: RequestHash,
    sequence: u32,
}

impl Replies<'_> {
    async fn send(&mut self, event: Event) -> Result<(), ExchangeError> {
        let reply = Reply { request: self.hash, audience: self.peer, sequence: self.sequence, at: now(), event };
        self.sequence += 1;
        let bytes = envelope::seal_reply(&self.node.identity.key, &reply);
        write_frame_bytes(&mut self.stream, &bytes, CONTROL_FRAME_MAX, Deadline::after(FRAME_DEADLINE)).await
    }

    async fn fail(&mut self, problem: Problem, outcome: Option<String>) -> Result<(), ExchangeError> {
        self.send(Event::Failed(Told { problem, clock: now(), outcome })).await
    }

    /// Returns when the requester has gone away: it has nothing more to say in this protocol.
    async fn requester_gone(&mut self) {
        let mut byte = [0];
        drop(self.stream.read(&mut byte).await);
    }
}

async fn request(
    daemon: &Arc<Daemon>,
    node: &Arc<Node>,
    replies: &mut Replies<'_>,
    bytes: Vec<u8>,
) -> Result<(), ExchangeError> {
    let peer = replies.peer;
    let signed = match envelope::open(&bytes, &peer, &node.identity.key.peer_id(), now()) {
        Ok(signed) => signed,
        Err(error) => {
            let threat = match error.code() {
                Code::ClockDrift | Code::Expired | Code::WrongAudience => Threat::V3,
                _ => Threat::V2,
            };
            record_refusal(daemon, peer, "request", threat, &error.to_problem()).await;
            return replies.fail(error.to_problem(), None).await;
        }
    };
    let verb = signed.body().verb();
    let Some(room) = node.room.clone() else {
        let problem = Problem::new(Code::NotGranted, "this machine runs no containers");
        record_refusal(daemon, peer, verb, Threat::G4, &problem).await;
        return replies.fail(problem, None).await;
    };
    drop(bytes);
    // Listening begins before the commit, so that no change after it is missed.
    let changes = room.changes();
    let body = signed.body().clone();
    let decided = {
        let share = daemon.quotas.of(peer);
        let _turn = share.work().await;
        decide(daemon, &room, signed).await
    };
    match decided {
        Err(error) => replies.fail(database_problem(&error), None).await,
        Ok(Err(refusal)) => {
            daemon.metrics.refused(refusal.problem.code);
            if daemon.refused.was_first(peer, refusal.problem.code, refusal.threat) {
                let message = format!("{verb} refused: {refusal}");
                daemon.notices.push("request_refused", Some(peer.to_string()), None, message);
            }
            replies.fail(refusal.problem, refusal.outcome).await
        }
        Ok(Ok(accepted)) => {
            daemon.metrics.accepted(verb);
            Conversation { daemon, node, room, changes, replies }.carry_out(body, accepted).await
        }
    }
}

/// Permission, replay mark, audit line and the room's own row: one transaction (STYLE, steps 7 and 8).
async fn decide(
    daemon: &Daemon,
    room: &Room<RunnerEngine>,
    signed: Signed,
) -> Result<Result<Option<Record>, Refusal>, DatabaseError> {
    let room = room.clone();
    let (run, refused, peer) = (daemon.run.clone(), daemon.refused.clone(), signed.signer());
    let decided = daemon
        .database
        .write(move |tx| {
            let (signer, moment) = (signed.signer(), run.moment(tx, now()));
            let held = room.held(tx, &signer)?;
            let share = room.share(tx, &signer, signed.body())?;
            let body = signed.body().clone();
            let id = signed.request_id();
            let authorised = match authorise(tx, signed, moment, held, share.as_ref(), &refused)? {
                Ok(authorised) => authorised,
                Err(refusal) => return Ok(Err(refusal)),
            };
            let recorded = match &body {
                Request::Deploy(deploy) => room.record(tx, &authorised, deploy)?.map(Some),
                Request::Push(offer) => room.check_push(tx, &authorised, offer)?.map(|()| None),
                Request::Stop(deployment)
                | Request::Start(deployment)
                | Request::Restart(deployment)
                | Request::Remove(deployment) => room.want(tx, &authorised, *deployment, &body)?.map(Some),
            };
            if let Err(refusal) = &recorded {
                replay::record_outcome(tx, &signer, &id, refusal.problem.code.as_str())?;
                let (threat, detail) = (refusal.threat, format!("request {id}: {}", refusal.problem.message));
                if refused.is_first(signer, refusal.problem.code, threat, &detail) {
                    let (at, actor, action) = (moment.now, signer.to_string(), body.verb().to_owned());
                    audit::append(tx, &Entry { at, actor, action, outcome: Outcome::Refused(threat), detail })?;
                }
            }
            Ok(recorded)
        })
        .await;
    if decided.is_err() {
        // Whatever line was in the transaction is gone with it.
        daemon.refused.forget(peer);
    }
    decided
}

/// An accepted request on its way to its end.
struct Conversation<'a, 'b> {
    daemon: &'a Daemon,
    node: &'a Arc<Node>,
    room: Room<RunnerEngine>,
    changes: Receiver<Change>,
    replies: &'a mut Replies<'b>,
}

impl Conversation<'_, '_> {
    async fn carry_out(mut self, body: Request, record: Option<Record>) -> Result<(), ExchangeError> {
        // Until the end of this conversation; before the first step of the deployment, which looks for it.
        let _attendance = self.room.attend(self.replies.hash);
        if let Some(record) = &record {
            self.room.committed(record);
            self.replies.send(Event::Accepted(record.id)).await?;
        }
        match (body, record) {
            (Request::Push(offer), _) => self.push(offer).await,
            (Request::Deploy(deploy), Some(record)) => {
                if let ImageSource::Offered(offer) = &deploy.image {
                    let owner = self.replies.peer;
                    match self.room.lacking(owner, self.replies.hash, offer).await {
                        Ok(layers) if layers.is_empty() => {}
                        Ok(layers) => self.replies.send(Event::Want(layers)).await?,
                        Err(problem) => self.room.abandon(record.id, problem).await,
                    }
                }
                self.follow(record.id, Goal::Running).await
            }
            (Request::Start(_) | Request::Restart(_), Some(record)) => self.follow(record.id, Goal::Running).await,
            (Request::Stop(_), Some(record)) => self.follow(record.id, Goal::Stopped).await,
            (Request::Remove(_), Some(record)) => self.follow(record.id, Goal::Removed).await,
            (_, None) => Ok(()),
        }
    }

    async fn push(self, offer: peer_proto::deploy::ImageOffer) -> Result<(), ExchangeError> {
        let (owner, hash) = (self.replies.peer, self.replies.hash);
        match self.room.lacking(owner, hash, &offer).await {
            Ok(layers) if layers.is_empty() => {}
            Ok(layers) => self.replies.send(Event::Want(layers)).await?,
            Err(problem) => return self.replies.fail(problem, None).await,
        }
        let pushed = tokio::select! {
            pushed = self.room.pushed(owner, hash, &offer) => pushed,
            () = withdrawal::until_withdrawn(&self.daemon.trust, owner) => Err(withdrawn()),
            () = self.replies.requester_gone() => return Ok(()),
        };
        match pushed {
            Ok(image) => self.replies.send(Event::Pushed(image)).await,
            Err(problem) => self.replies.fail(problem, None).await,
        }
    }

    /// Tells every change until the goal is reached, or the requester goes away; the deployment goes on without it.
    async fn follow(&mut self, id: DeploymentId, goal: Goal) -> Result<(), ExchangeError> {
        let owner = self.replies.peer;
        let mut last = None;
        loop {
            let (status, restarting) = match self.room.progress(owner, id).await {
                Ok((status, restarting)) => (Some(status), restarting),
                Err(problem) if problem.code == Code::NoSuchDeployment => (None, false),
                Err(problem) => return self.replies.fail(problem, None).await,
            };
            // The end that comes before a new start is not what was asked for.
            if !restarting && let Some(event) = goal.reached(id, status.as_ref()) {
                let event = with_lease(&self.room, &self.node.ingress, owner, event, id).await;
                return self.replies.send(event).await;
            }
            if let Some(status) = status
                && last.as_ref() != Some(&status)
            {
                last = Some(status.clone());
                self.replies.send(Event::Changed(Box::new(status))).await?;
            }
            tokio::select! {
                () = next_change(&mut self.changes, id) => {}
                () = self.replies.requester_gone() => return Ok(()),
            }
        }
    }
}

/// A start is told with its public address; a stop is told once that address is gone.
async fn with_lease(
    room: &Room<RunnerEngine>,
    ingress: &Ingress,
    owner: PeerId,
    event: Event,
    id: DeploymentId,
) -> Event {
    match event {
        Event::Done(status) if status.state == State::Running => {
            if status.specification.publish && ingress.wait_until_live(id, LEASE_PATIENCE).await {
                let fresh = room.status(owner, id).await;
                return Event::Done(fresh.map_or(status, Box::new));
            }
            Event::Done(Box::new(explained(ingress, *status)))
        }
        // It keeps its name.
        Event::Done(status) if status.state == State::Paused => Event::Done(status),
        other => {
            ingress.wait_until_released(id, LEASE_PATIENCE).await;
            other
        }
    }
}

/// A published deployment without a public address says why.
fn explained(ingress: &Ingress, mut status: Status) -> Status {
    if status.state == State::Running && status.specification.publish && status.url.is_none() {
        status.problem = Some(ingress.why_unpublished(status.id));
    }
    status
}

async fn next_change(changes: &mut Receiver<Change>, id: DeploymentId) {
    loop {
        match changes.recv().await {
            Ok(change) if change.id != id => {}
            // A listener that lagged behind reads the row again, as after any change.
            Ok(_) | Err(RecvError::Lagged(_)) => return,
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}

/// What a request waits for.
#[derive(Clone, Copy)]
enum Goal {
    Running,
    Stopped,
    Removed,
}

impl Goal {
    fn reached(self, id: DeploymentId, status: Option<&Status>) -> Option<Event> {
        let Some(status) = status else { return Some(Event::Removed(id)) };
        match (self, status.state) {
            (Self::Running, State::Failed) => {
                let problem = status.problem.clone().unwrap_or_else(|| Problem::new(Code::EngineFailed, "it failed"));
                Some(Event::Failed(Told { problem, clock: now(), outcome: None }))
            }
            // It was stopped although its owner wanted it to run.
            (Self::Running, State::Stopped) if status.problem.is_some() => {
                let problem = status.problem.clone().unwrap_or_else(withdrawn);
                Some(Event::Failed(Told { problem, clock: now(), outcome: None }))
            }
            (Self::Running, State::Running | State::Stopped | State::Paused)
            | (Self::Stopped, State::Stopped | State::Failed) => Some(Event::Done(Box::new(status.clone()))),
            _ => None,
        }
    }
}

/// A list tells what a table shows; the rest, which may be large, is told of one deployment at a time.
fn brief(mut status: Status) -> Status {
    status.specification.environment.clear();
    status.specification.command.clear();
    status.specification.entrypoint = None;
    status
}

async fn answer(daemon: &Daemon, node: &Node, peer: PeerId, query: Query) -> Result<Answer, Problem> {
    let trust = daemon.trust.snapshot();
    let Some(record) = trust.peers.get(&peer) else {
        return Err(Problem::new(Code::UntrustedPeer, "this machine has not added you as a peer"));
    };
    let Some(room) = &node.room else {
        return match query {
            Query::List => Ok(Answer::List(Vec::new())),
            _ => Err(Problem::new(Code::NotGranted, "this machine runs no containers")),
        };
    };
    let database = |error: DatabaseError| database_problem(&error);
    Ok(match query {
        Query::List => Answer::List(room.statuses(peer).await.map_err(database)?.into_iter().map(brief).collect()),
        Query::Inspect(id) => Answer::Inspect(Box::new(explained(&node.ingress, room.status(peer, id).await?))),
        Query::Stats(id) => Answer::Stats(room.usage(peer, id).await?),
        Query::Capacity => {
            let capacity = room.capacity(record, peer_compute::fetch::architecture()).await.map_err(database)?;
            Answer::Capacity(Box::new(capacity))
        }
    })
}
