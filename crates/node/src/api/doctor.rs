//! `doctor`: looks at everything that must be right for this machine to work and to hold, and says what to do where it is not.
//!
//! Each file of the folder looks at one thing. A new check is a function from [`Examined`] to findings and one line in
//! [`examine`]; its id, the finding's `check`, stands in `docs/operations.md`.

mod clock;
mod engine;
mod engine_port;
mod files;
mod machine;
mod reach;
mod versions;

use std::sync::Arc;

use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json, Router};
use peer_compute::engine::{EngineError, EngineFacts};
use peer_compute::room::Room;
use peer_compute::wall::Availability;
use peer_proto::code::{Code, Problem};
use peer_proto::control::{Finding, Level};

use super::Failure;
use crate::daemon::Daemon;
use crate::node::Node;

pub(super) fn routes() -> Router<Arc<Daemon>> {
    Router::new().route("/v1/doctor", get(doctor)).route("/v1/doctor/accept-clock", post(accept_clock))
}

async fn doctor(State(daemon): State<Arc<Daemon>>) -> Result<Json<Vec<Finding>>, Failure> {
    examine(daemon).await
}

async fn accept_clock(State(daemon): State<Arc<Daemon>>) -> Result<Json<Vec<Finding>>, Failure> {
    clock::accept(&daemon).await?;
    examine(daemon).await
}

/// What the checks look at, asked once.
struct Examined {
    daemon: Arc<Daemon>,
    /// The node, or why there is none.
    node: Result<Arc<Node>, Problem>,
    /// The engine's answer; absent if this machine runs nobody's containers, or has no node.
    engine: Option<Result<EngineFacts, EngineError>>,
    /// Whether ways out of containers are offered; absent like the engine.
    wall: Option<Availability>,
}

impl Examined {
    async fn look(daemon: Arc<Daemon>) -> Self {
        let node = daemon.node().await;
        let room = node.as_ref().ok().and_then(|node| node.room.clone());
        let wall = room.as_ref().map(Room::wall);
        let engine = match room {
            Some(room) => Some(room.engine_facts().await),
            None => None,
        };
        Self { daemon, node, engine, wall }
    }
}

/// Every check, in the order in which it is told.
async fn examine(daemon: Arc<Daemon>) -> Result<Json<Vec<Finding>>, Failure> {
    let examined = Examined::look(daemon).await;
    let mut findings = vec![identity(&examined)];
    findings.extend(machine::check(&examined));
    findings.extend(files::check(&examined));
    findings.extend(clock::check(&examined).await?);
    findings.extend(reach::check(&examined));
    findings.extend(engine::check(&examined));
    findings.extend(versions::check(&examined));
    findings.push(engine_port::check().await);
    Ok(Json(findings))
}

fn identity(examined: &Examined) -> Finding {
    match &examined.node {
        Ok(node) => ok("identity", format!("this machine is {}", node.identity.key.peer_id())),
        Err(problem) if problem.code == Code::Locked => {
            let advice = "run: peerctl identity unlock; until then nobody is served, and what runs here is left alone";
            failure("identity", "the identity is sealed and has not been unlocked", advice)
        }
        Err(problem) => failure("identity", problem.message.clone(), "run: peerctl init"),
    }
}

/// As it should be.
fn ok(check: &str, message: impl Into<String>) -> Finding {
    Finding { check: check.to_owned(), level: Level::Ok, message: message.into(), advice: None }
}

/// Good to know; nothing is wrong.
fn note(check: &str, message: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding { level: Level::Note, advice: Some(advice.into()), ..ok(check, message) }
}

/// It works, and less holds than could.
fn warning(check: &str, message: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding { level: Level::Warning, ..note(check, message, advice) }
}

/// It does not work, or does not hold.
fn failure(check: &str, message: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding { level: Level::Failure, ..note(check, message, advice) }
}
