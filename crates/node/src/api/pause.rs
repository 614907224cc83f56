//! Pausing what others run here, and letting it go on.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::routing::post;
use axum::{Json, Router};
use peer_compute::room::Room;
use peer_compute::runner::RunnerEngine;
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use peer_proto::deploy::{State as Life, Status};
use peer_proto::id::DeploymentId;
use peer_proto::pause::{Affected, PauseReport, PauseRequest, PauseShown, ResumeRequest};
use peer_proto::text::escape;
use peer_state::audit::{self, Entry, Outcome};
use peer_state::database::{DatabaseError, Tx};
use peer_trust::pause::{self, Means, Pause, Subject};
use tokio::sync::broadcast::error::RecvError;

use super::{Failure, Payload, to_the_end};
use crate::clock;
use crate::daemon::Daemon;
use crate::emergency;

/// Letters of an id that are enough to name a deployment, if it is the only one.
const PREFIX_MIN: usize = 4;
/// How long an answer waits until everything is as it was asked for.
const SETTLE: Duration = Duration::from_secs(20);

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new().route("/v1/pause", post(hold)).route("/v1/resume", post(resume))
}

async fn hold(
    State(daemon): State<Arc<Daemon>>,
    Payload(request): Payload<PauseRequest>,
) -> Result<Json<PauseReport>, Failure> {
    to_the_end(&daemon, held(daemon.clone(), request)).await.map(Json)
}

async fn resume(
    State(daemon): State<Arc<Daemon>>,
    Payload(request): Payload<ResumeRequest>,
) -> Result<Json<PauseReport>, Failure> {
    to_the_end(&daemon, resumed(daemon.clone(), request)).await.map(Json)
}

/// What a request is about.
#[derive(Debug)]
struct About {
    subjects: Vec<Subject>,
    /// The deployments that it concerns.
    chosen: BTreeSet<DeploymentId>,
}

type Hosted = Vec<(PeerId, Status)>;

async fn held(daemon: Arc<Daemon>, request: PauseRequest) -> Result<PauseReport, Failure> {
    let about = about(&daemon, &hosted(&daemon).await?, request.peer.as_deref(), &request.deployments)?;
    let pause = Pause { means: if request.stop { Means::Stop } else { Means::Freeze }, since: clock::now() };
    let subjects = about.subjects.clone();
    let work = move |tx: &Tx<'_>| -> Result<(), DatabaseError> {
        for subject in &subjects {
            // A stronger pause is not weakened by a second request, and an emergency is not covered up.
            let former = pause::find(tx, subject)?;
            if former.is_none_or(|former| former.means < pause.means) {
                pause::set(tx, subject, &pause)?;
            }
            let detail = format!("{}: {}", describe(subject), means(pause.means));
            audit::append(tx, &entry("paused", detail, pause.since))?;
        }
        Ok(())
    };
    daemon.database.write(work).await?;
    settled(&daemon, &about, |state| !matches!(state, Life::Starting | Life::Running)).await
}

async fn resumed(daemon: Arc<Daemon>, request: ResumeRequest) -> Result<PauseReport, Failure> {
    let hosted = hosted(&daemon).await?;
    let mut about = about(&daemon, &hosted, request.peer.as_deref(), &request.deployments)?;
    let (now, all) = (clock::now(), request.all);
    if all {
        about.chosen = hosted.iter().map(|(_, status)| status.id).collect();
    }
    let single = request.peer.is_some() && request.deployments.is_empty();
    let (subjects, chosen) = (about.subjects.clone(), about.chosen.clone());
    let work = move |tx: &Tx<'_>| -> Result<(), DatabaseError> {
        for (subject, _) in pause::all(tx)? {
            let of_peer = single && matches!(&subject, Subject::Deployment(id) if chosen.contains(id));
            if all || of_peer || subjects.contains(&subject) {
                pause::clear(tx, &subject)?;
                audit::append(tx, &entry("resumed", describe(&subject), now))?;
            }
        }
        Ok(())
    };
    daemon.database.write(work).await?;
    let closed = daemon.database.write(emergency::is_closed).await?;
    daemon.closed.send_replace(closed);
    if let Some(room) = room(&daemon).await {
        room.set_closed(closed);
    }
    settled(&daemon, &about, |state| state != Life::Paused).await
}

fn about(daemon: &Daemon, hosted: &Hosted, peer: Option<&str>, deployments: &[String]) -> Result<About, Problem> {
    let peer = peer.map(|text| daemon.trust.snapshot().find(text).map(|record| record.peer)).transpose()?;
    let of_peer = |owner: &PeerId| peer.is_none_or(|peer| peer == *owner);
    if deployments.is_empty() {
        let chosen = hosted.iter().filter(|(owner, _)| of_peer(owner)).map(|(_, status)| status.id).collect();
        return Ok(About { subjects: vec![peer.map_or(Subject::Machine, Subject::Peer)], chosen });
    }
    let find = |text: &String| {
        let named = |status: &Status| status.specification.name.as_str() == text;
        let prefixed = |status: &Status| text.len() >= PREFIX_MIN && status.id.to_string().starts_with(text.as_str());
        let fits = |by: &dyn Fn(&Status) -> bool| -> Vec<DeploymentId> {
            hosted.iter().filter(|(owner, status)| of_peer(owner) && by(status)).map(|(_, status)| status.id).collect()
        };
        let found = Some(fits(&named)).filter(|found| !found.is_empty()).unwrap_or_else(|| fits(&prefixed));
        match found[..] {
            [one] => Ok(one),
            [] => Err(Problem::new(
                Code::NoSuchDeployment,
                format!("no peer has a deployment '{}' here; `peerctl ps --hosted --all` shows them", escape(text)),
            )),
            _ => Err(Problem::new(
                Code::Ambiguous,
                format!("'{}' fits more than one deployment here; add --peer, or write more of its id", escape(text)),
            )),
        }
    };
    let chosen = deployments.iter().map(find).collect::<Result<BTreeSet<_>, _>>()?;
    Ok(About { subjects: chosen.iter().copied().map(Subject::Deployment).collect(), chosen })
}

async fn hosted(daemon: &Daemon) -> Result<Hosted, DatabaseError> {
    match room(daemon).await {
        Some(room) => room.all_statuses().await,
        None => Ok(Vec::new()),
    }
}

async fn room(daemon: &Daemon) -> Option<Room<RunnerEngine>> {
    daemon.node().await.ok()?.room.clone()
}

/// Waits for a moment until the deployments concerned are as they should be, and says how they are.
async fn settled(daemon: &Daemon, about: &About, so: impl Fn(Life) -> bool) -> Result<PauseReport, Failure> {
    if let Some(room) = room(daemon).await {
        let mut changes = room.changes();
        room.wake_all();
        let wait = async {
            loop {
                let all = room.all_statuses().await?;
                let mut concerned = all.iter().filter(|(_, status)| about.chosen.contains(&status.id));
                if concerned.all(|(_, status)| so(status.state)) || changes.recv().await == Err(RecvError::Closed) {
                    return Ok::<_, DatabaseError>(());
                }
            }
        };
        if let Ok(waited) = tokio::time::timeout(SETTLE, wait).await {
            waited?;
        }
    }
    Ok(report(daemon, &hosted(daemon).await?, about).await?)
}

/// Every pause in force, as it is shown.
pub(super) async fn in_force(daemon: &Daemon) -> Result<Vec<PauseShown>, DatabaseError> {
    let about = About { subjects: Vec::new(), chosen: BTreeSet::new() };
    Ok(report(daemon, &hosted(daemon).await?, &about).await?.pauses)
}

async fn report(daemon: &Daemon, hosted: &Hosted, about: &About) -> Result<PauseReport, DatabaseError> {
    let list = daemon.trust.snapshot();
    let name_of =
        |peer: &PeerId| list.peers.get(peer).map_or_else(|| peer.to_string(), |record| record.name.to_string());
    let deployment = |id: &DeploymentId| {
        let found = hosted.iter().find(|(_, status)| status.id == *id);
        found.map_or_else(|| id.to_string(), |(_, status)| status.specification.name.to_string())
    };
    let shown = |(subject, pause): (Subject, Pause)| {
        let (kind, name) = match &subject {
            Subject::Machine => ("machine", None),
            Subject::Peer(peer) => ("peer", Some(name_of(peer))),
            Subject::Deployment(id) => ("deployment", Some(deployment(id))),
        };
        PauseShown { subject: kind.to_owned(), name, means: means(pause.means).to_owned(), since: pause.since }
    };
    let affected = |(owner, status): &(PeerId, Status)| Affected {
        id: status.id,
        name: status.specification.name.clone(),
        owner: name_of(owner),
        state: status.state,
        problem: status.problem.clone(),
    };
    let concerned = hosted.iter().filter(|(_, status)| about.chosen.contains(&status.id));
    let pauses = daemon.database.write(pause::all).await?;
    Ok(PauseReport { pauses: pauses.into_iter().map(shown).collect(), deployments: concerned.map(affected).collect() })
}

fn means(means: Means) -> &'static str {
    match means {
        Means::Freeze => "freeze",
        Means::Stop => "stop",
        Means::Kill => "panic",
    }
}

fn describe(subject: &Subject) -> String {
    match subject {
        Subject::Machine => "whole machine".to_owned(),
        Subject::Peer(peer) => format!("peer {peer}"),
        Subject::Deployment(id) => format!("deployment {id}"),
    }
}

fn entry(action: &str, detail: String, at: peer_proto::unit::Timestamp) -> Entry {
    Entry { at, actor: "local".to_owned(), action: action.to_owned(), outcome: Outcome::Allowed, detail }
}
