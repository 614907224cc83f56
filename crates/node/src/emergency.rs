//! The emergency stop: everything of others is ended, all connections are cut, and what is known is kept.
//!
//! First it is stopped, then it is told. No step waits for one that may fail: without a database the containers are ended
//! and the connections cut until the daemon ends; without an engine the rest is done, and the containers are ended as soon as
//! it answers.

mod archive;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use peer_compute::room::emergency::{Killed, close, kill_all, mark};
use peer_compute::room::{Room, database_problem};
use peer_compute::runner::RunnerEngine;
use peer_proto::code::{Code, Problem};
use peer_proto::panic::PanicReport;
use peer_proto::unit::Timestamp;
use peer_state::audit::{self, Entry, Outcome};
use peer_state::data_dir::create_private;
use peer_state::database::{DatabaseError, Tx};
use peer_trust::pause::Subject;
use peer_trust::pause::{Means, Pause, find};
use serde_json::{Value, json};
use tokio::time::timeout;

use self::archive::Archive;
use crate::clock;
use crate::daemon::Daemon;

/// How long the database may take before the containers are ended without it.
const RECORD: Duration = Duration::from_secs(2);
/// How long everything may take to end.
const KILL: Duration = Duration::from_secs(15);
/// How long connections may take to be seen closed.
const CUT: Duration = Duration::from_secs(2);
/// How long the gathering of evidence may take.
const GATHER: Duration = Duration::from_secs(30);
/// Lines of the audit log that are kept; the whole of it is in the database.
const AUDIT_LINES: u32 = 100_000;

/// Whether the machine was closed in an emergency and not resumed.
pub(crate) fn is_closed(tx: &Tx<'_>) -> Result<bool, DatabaseError> {
    Ok(find(tx, &Subject::Machine)?.is_some_and(|pause| pause.means == Means::Kill))
}

/// Closes the machine, and says what was done. What could not be done is in the answer, and keeps nothing else from being
/// tried.
pub(crate) async fn panic(daemon: &Arc<Daemon>) -> PanicReport {
    let now = clock::now();
    let mut problems = Vec::new();
    let node = match daemon.node().await {
        Ok(node) => Some(node),
        Err(problem) if matches!(problem.code, Code::NoIdentity | Code::Locked) => None,
        Err(problem) => {
            problems.push(problem);
            None
        }
    };
    let connected = node.as_ref().map_or(0, |node| node.network.connections().len());
    // In memory first: the gate and the driver need no database for it.
    daemon.closed.send_replace(true);
    if let Err(problem) = record(daemon, now).await {
        problems.push(problem);
    }
    let room = node.as_ref().and_then(|node| node.room.clone());
    let killed = end_containers(daemon, room.as_ref()).await;
    problems.extend(killed.problem.clone());
    if let Some(node) = &node {
        let cut = async {
            while !node.network.connections().is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if timeout(CUT, cut).await.is_err() {
            problems.push(Problem::new(Code::Timeout, "some connections are still being closed"));
        }
    }
    let evidence = match keep(daemon, room.as_ref(), &killed, now).await {
        Ok(path) => Some(path.display().to_string()),
        Err(problem) => {
            problems.push(problem);
            None
        }
    };
    daemon.notices.push("panic", None, None, format!("everything was stopped: {} containers", killed.stopped.len()));
    PanicReport {
        stopped: killed.stopped,
        still_running: killed.left,
        connections_cut: u32::try_from(connected).unwrap_or(u32::MAX),
        evidence,
        problems,
    }
}

async fn end_containers(daemon: &Daemon, room: Option<&Room<RunnerEngine>>) -> Killed {
    if let Some(room) = room {
        return room.kill_all(KILL).await;
    }
    // Without a running node, as while the identity is sealed, containers run on all the same.
    let Some(runner) = &daemon.runner else { return Killed::default() };
    match daemon.database.write(mark).await {
        Ok(mark) => kill_all(&RunnerEngine::new(runner.clone()), &mark, KILL).await,
        Err(error) => Killed { problem: Some(database_problem(&error)), ..Killed::default() },
    }
}

/// Makes it durable: a daemon that is killed in the middle starts closed.
async fn record(daemon: &Daemon, now: Timestamp) -> Result<(), Problem> {
    let work = move |tx: &Tx<'_>| -> Result<(), DatabaseError> {
        let held = close(tx, &Pause { means: Means::Kill, since: now })?;
        let names: Vec<_> = held.iter().map(ToString::to_string).collect();
        let detail = format!("deployments ended: {}", if names.is_empty() { "none".into() } else { names.join(", ") });
        let (actor, action, outcome) = ("local".to_owned(), "panic".to_owned(), Outcome::Allowed);
        audit::append(tx, &Entry { at: now, actor, action, outcome, detail })
    };
    match timeout(RECORD, daemon.database.write(work)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(not_durable(&database_problem(&error))),
        Err(_) => Err(not_durable(&Problem::new(Code::Timeout, "the database does not answer"))),
    }
}

fn not_durable(problem: &Problem) -> Problem {
    let message =
        format!("it is stopped now, but could not be recorded: do not start peerd again before it is ({problem})");
    Problem::new(problem.code, message)
}

/// Writes the archive and gives its path.
async fn keep(
    daemon: &Arc<Daemon>,
    room: Option<&Room<RunnerEngine>>,
    killed: &Killed,
    now: Timestamp,
) -> Result<PathBuf, Problem> {
    let mut archive = Archive::default();
    let gathered = timeout(GATHER, gather(daemon, room, &mut archive)).await;
    let complete = gathered.is_ok();
    archive.json(
        "panic.json",
        &json!({
            "at": now,
            "daemon_version": env!("CARGO_PKG_VERSION"),
            "stopped": killed.stopped,
            "still_running": killed.left,
            "problem": killed.problem,
            "complete": complete,
        }),
    );
    let directory = daemon.data_dir.join("evidence");
    let path = directory.join(format!("panic-{}.tar.gz", now.0));
    let written = path.clone();
    let write = move || -> Result<(), Problem> {
        let failed = |error: &dyn std::fmt::Display| {
            Problem::new(Code::FileFailed, format!("the evidence could not be kept: {error}"))
        };
        create_private(&directory).map_err(|error| failed(&error))?;
        let bytes = archive.finish(now).map_err(|error| failed(&error))?;
        peer_state::durable::write(&written, &bytes, 0o600).map_err(|error| failed(&error))
    };
    let done = tokio::task::spawn_blocking(write).await;
    done.map_err(|error| Problem::new(Code::Internal, error.to_string()))??;
    Ok(path)
}

/// Collects what there is, in the order of its worth. What cannot be had is noted in its place.
async fn gather(daemon: &Arc<Daemon>, room: Option<&Room<RunnerEngine>>, archive: &mut Archive) {
    let audited =
        daemon.database.write(|tx| Ok::<_, DatabaseError>((audit::verify(tx, None)?, audit::newest(tx, AUDIT_LINES)?)));
    match audited.await {
        Ok((verdict, lines)) => {
            archive.json("audit-verify.json", &json!(verdict));
            archive.json("audit.json", &json!(lines));
        }
        Err(error) => archive.text("audit.problem", &error.to_string()),
    }
    archive.json("trust.json", &trust_list(daemon));
    archive.json("settings.json", &json!(daemon.settings.explain()));
    archive.json("notices.json", &json!(daemon.notices.recent()));
    let Some(room) = room else { return };
    match room.engine_facts().await {
        Ok(facts) => archive.text("engine.txt", &format!("{facts:#?}\n")),
        Err(error) => archive.text("engine.problem", &error.to_string()),
    }
    match room.evidence(GATHER / 2).await {
        Ok(evidence) => {
            for one in evidence {
                let directory = Path::new("deployments").join(one.id.to_string());
                let name = |name: &str| directory.join(name).display().to_string();
                archive.json(&name("row.json"), &one.row);
                if let Some(inspection) = &one.inspection {
                    archive.json(&name("inspection.json"), inspection);
                }
                archive.bytes(&name("log.txt"), &one.log);
                if !one.problems.is_empty() {
                    archive.text(&name("problems.txt"), &one.problems.join("\n"));
                }
            }
        }
        Err(error) => archive.text("deployments.problem", &error.to_string()),
    }
}

/// Peers with their grants and addresses. Of invitations only what is public: their secrets are nowhere here anyway.
fn trust_list(daemon: &Daemon) -> Value {
    let list = daemon.trust.snapshot();
    let peers: Vec<_> = list
        .peers
        .values()
        .map(|peer| {
            let addresses: Vec<_> = peer.addresses().iter().map(ToString::to_string).collect();
            json!({
                "peer_id": peer.peer.to_string(), "name": peer.name, "grants": peer.grants,
                "addresses": addresses, "added_at": peer.added_at,
            })
        })
        .collect();
    let open: Vec<_> =
        list.invitations.values().map(|open| json!({ "expires_at": open.expires_at, "grants": open.grants })).collect();
    let gateways: Vec<_> = daemon
        .gateways
        .list()
        .iter()
        .map(|one| json!({ "peer_id": one.peer.to_string(), "address": one.address.to_string() }))
        .collect();
    json!({ "peers": peers, "open_invitations": open, "gateways": gateways })
}
