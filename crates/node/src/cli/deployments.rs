//! `ps`, `status` and `inspect`.

use clap::Args;
use peer_proto::control::{Deployment, Deployments, EngineStatus, NodeStatus};
use peer_proto::deploy::{Health, Isolation, Specification, State};
use peer_proto::text::escape;

use super::client::percent_encoded;
use super::failure::Failure;
use super::gateways;
use super::grants::in_words;
use super::moment::{ago, now, rfc3339};
use super::output::{self, json_pretty};
use super::pause;
use super::table::{fields, table};
use super::{Session, parse_reference};

/// List deployments
///
/// Those of this machine on its peers, or with --hosted those of peers on this machine. Stopped ones are left out
/// without --all.
///
/// Example: peerctl ps --all
#[derive(Debug, Args)]
#[command(visible_alias = "ls")]
pub(super) struct PsArguments {
    /// Stopped ones too
    #[arg(short, long)]
    all: bool,
    /// Only those on this peer
    #[arg(long, value_parser = parse_reference, conflicts_with = "hosted")]
    peer: Option<String>,
    /// Those of peers on this machine
    #[arg(long)]
    hosted: bool,
    /// Print ids alone; with --json as a list
    #[arg(short = 'q', long = "ids")]
    ids: bool,
}

/// Show this machine's state, or that of one deployment
///
/// Example: peerctl status web
#[derive(Debug, Args)]
pub(super) struct StatusArguments {
    /// Deployment: name or id
    #[arg(value_parser = parse_reference)]
    deployment: Option<String>,
    /// The peer that it runs on, if its name is not unique
    #[arg(long, requires = "deployment", value_parser = parse_reference)]
    peer: Option<String>,
}

/// Show everything about a deployment, as JSON
///
/// Example: peerctl inspect web
#[derive(Debug, Args)]
pub(super) struct InspectArguments {
    /// Deployment: name or id
    #[arg(value_parser = parse_reference)]
    deployment: String,
    /// The peer that it runs on, if its name is not unique
    #[arg(long, value_parser = parse_reference)]
    peer: Option<String>,
}

/// Path of a deployment in the local interface.
pub(super) fn path_of(deployment: &str) -> String {
    format!("/v1/deployments/{}", percent_encoded(deployment))
}

/// Asks for one deployment.
pub(super) async fn get(session: &Session, deployment: &str, peer: Option<&str>) -> Result<Deployment, Failure> {
    let query = peer.map(|peer| format!("?peer={}", percent_encoded(peer))).unwrap_or_default();
    session.client.get(&format!("{}{query}", path_of(deployment))).await
}

/// Runs `ps`.
pub(super) async fn ps(session: &Session, arguments: &PsArguments) -> Result<(), Failure> {
    let query = match (&arguments.peer, arguments.hosted) {
        (Some(peer), _) => format!("?peer={}", percent_encoded(peer)),
        (None, true) => "?hosted=true".to_owned(),
        (None, false) => String::new(),
    };
    let mut found: Deployments = session.client.get(&format!("/v1/deployments{query}")).await?;
    if !arguments.all {
        found.deployments.retain(|deployment| deployment.status.state != State::Stopped);
    }
    if arguments.ids {
        let ids: Vec<String> = found.deployments.iter().map(|deployment| deployment.status.id.to_string()).collect();
        session.output.result(&ids, |ids| ids.iter().flat_map(|id| [id, "\n"]).collect())?;
    } else {
        session.output.result(&found, |found| {
            let rows: Vec<_> = found.deployments.iter().map(row).collect();
            table(
                ["NAME", "ID", if arguments.hosted { "OWNER" } else { "PEER" }, "IMAGE", "STATE", "CREATED", "URL"],
                &rows,
            )
        })?;
    }
    for one in &found.unreachable {
        output::warn(&format!("{} did not answer: {}", escape(&one.peer), escape(&one.problem.message)));
    }
    Ok(())
}

fn row(deployment: &Deployment) -> [String; 7] {
    let status = &deployment.status;
    [
        status.specification.name.to_string(),
        status.id.short(),
        deployment.peer.clone(),
        status.specification.image_name.clone(),
        state(deployment),
        format!("{} ago", ago(now(), status.created_at)),
        status.url.clone().unwrap_or_default(),
    ]
}

/// The state with what qualifies it: health, exit code, and its age if the peer does not answer.
fn state(deployment: &Deployment) -> String {
    let status = &deployment.status;
    let mut remarks = Vec::new();
    match (status.state, status.health, status.exit_code) {
        (State::Running, Some(Health::Unhealthy), _) => remarks.push("unhealthy".to_owned()),
        (State::Running, Some(Health::Healthy), _) => remarks.push("healthy".to_owned()),
        (State::Stopped | State::Failed, _, Some(code)) => remarks.push(format!("exit code {code}")),
        _ => {}
    }
    if !deployment.reachable {
        remarks.push(format!("{} ago, peer offline", ago(now(), deployment.as_of)));
    }
    if remarks.is_empty() { status.state.to_string() } else { format!("{} ({})", status.state, remarks.join(", ")) }
}

/// Runs `status`.
pub(super) async fn status(session: &Session, arguments: &StatusArguments) -> Result<(), Failure> {
    if let Some(deployment) = &arguments.deployment {
        let deployment = get(session, deployment, arguments.peer.as_deref()).await?;
        return session.output.result(&deployment, in_full);
    }
    let status: NodeStatus = session.client.get("/v1/status").await?;
    session.output.result(&status, node_in_full)
}

/// Runs `inspect`.
pub(super) async fn inspect(session: &Session, arguments: &InspectArguments) -> Result<(), Failure> {
    let deployment = get(session, &arguments.deployment, arguments.peer.as_deref()).await?;
    if session.output.is_json() {
        return session.output.result(&deployment, |_| String::new());
    }
    output::text(&format!("{}\n", json_pretty(&deployment)?))
}

fn in_full(deployment: &Deployment) -> String {
    let status = &deployment.status;
    let specification = &status.specification;
    fields(&[
        ("name", specification.name.to_string()),
        ("id", status.id.to_string()),
        ("peer", format!("{} ({})", deployment.peer, deployment.peer_id)),
        ("state", state(deployment)),
        ("problem", status.problem.as_ref().map(|problem| problem.message.clone()).unwrap_or_default()),
        ("url", status.url.clone().unwrap_or_default()),
        ("image", specification.image_name.clone()),
        ("port", specification.expose.map(|port| port.to_string()).unwrap_or_default()),
        ("limits", format!("{} CPU, {}", specification.limits.cpu, specification.limits.memory)),
        ("isolation", status.isolation.as_ref().map(isolation).unwrap_or_default()),
        ("egress", ways(specification)),
        ("restart", format!("{}, {} restarts", specification.restart, status.restarts)),
        ("created", rfc3339(status.created_at)),
        ("started", status.started_at.map(rfc3339).unwrap_or_default()),
    ])
}

/// How well containers are kept apart, in words.
pub(super) fn isolation(isolation: &Isolation) -> String {
    let users = if isolation.user_namespace { "mapped users" } else { "users not mapped" };
    let root = if isolation.writable_root { ", writable roots possible" } else { "" };
    format!("runtime {}, {users}{root}", isolation.runtime)
}

/// What it may reach outside of itself; nothing, for most.
fn ways(specification: &Specification) -> String {
    let shared = specification.network.as_ref().map(|name| format!("{}, network {name}", specification.egress));
    shared.unwrap_or_else(|| specification.egress.to_string())
}

fn node_in_full(status: &NodeStatus) -> String {
    let identity = status.identity.as_ref();
    let capacity = &status.offered;
    let free = match (&capacity.free_cpu, &capacity.free_memory) {
        (Some(cpu), Some(memory)) => format!("{cpu} CPU, {memory}, {} containers", capacity.free_containers),
        _ => "nothing".to_owned(),
    };
    let mut text = fields(&[
        ("version", status.version.clone()),
        ("name", identity.map_or_else(|| without_identity(status).to_owned(), |own| own.name.to_string())),
        ("peer id", identity.map(|own| own.peer_id.clone()).unwrap_or_default()),
        ("addresses", identity.map(|own| own.addresses.join(", ")).unwrap_or_default()),
        ("running since", rfc3339(status.started_at)),
        ("peers", format!("{} ({} connected)", status.peers, status.peers_connected)),
        ("engine", if status.locked { "waits for the identity".to_owned() } else { engine(status.engine.as_ref()) }),
        ("egress", egress(status.engine.as_ref())),
        ("hosted", format!("{} deployments of peers", status.hosted)),
        ("offered", in_words(&peer_proto::grant::Grants { deploy: capacity.granted.clone() })),
        ("free", free),
        ("isolation", capacity.isolation.as_ref().map(isolation).unwrap_or_default()),
    ]);
    if !status.pauses.is_empty() {
        text.push('\n');
        text.extend(status.pauses.iter().map(pause::line));
    }
    if !status.gateways.is_empty() {
        text.push('\n');
        text.push_str(&gateways::list(&status.gateways));
    }
    text
}

fn without_identity(status: &NodeStatus) -> &'static str {
    if status.locked { "locked; run peerctl identity unlock" } else { "none yet; run peerctl init" }
}

fn engine(engine: Option<&EngineStatus>) -> String {
    match engine {
        None => "none; this machine hosts nothing".to_owned(),
        Some(EngineStatus { problem: Some(problem), .. }) => format!("not usable: {}", problem.message),
        Some(EngineStatus { available: false, .. }) => "does not answer".to_owned(),
        Some(EngineStatus { version, .. }) => version.clone().unwrap_or_else(|| "available".to_owned()),
    }
}

/// Whether containers can be given ways out here.
fn egress(engine: Option<&EngineStatus>) -> String {
    match engine {
        None => String::new(),
        Some(EngineStatus { egress_problem: Some(problem), .. }) => problem.message.clone(),
        Some(_) => "offered to whom you allow it; see `peerctl peers allow --help`".to_owned(),
    }
}

#[cfg(test)]
mod tests;
