//! `stop`, `start`, `restart` and `rm`: one signed request for each deployment named, in their order.

use clap::Args;
use hyper::Method;
use peer_proto::code::Code;
use peer_proto::control::{Deployment, Progress};
use peer_proto::id::DeploymentId;
use peer_proto::text::escape;
use serde::Serialize;

use super::client::SILENCE_DEADLINE;
use super::deploy::unexpected;
use super::deployments::path_of;
use super::failure::Failure;
use super::transfer::Follower;
use super::{Session, parse_reference};

/// Stop deployments; they can be started again
///
/// Example: peerctl stop web
#[derive(Debug, Args)]
pub(super) struct StopArguments {
    /// Deployments: names or ids
    #[arg(required = true, value_name = "DEPLOYMENT", value_parser = parse_reference)]
    deployments: Vec<String>,
}

/// Start deployments that were stopped or have failed
///
/// Example: peerctl start web
#[derive(Debug, Args)]
pub(super) struct StartArguments {
    /// Deployments: names or ids
    #[arg(required = true, value_name = "DEPLOYMENT", value_parser = parse_reference)]
    deployments: Vec<String>,
}

/// Stop deployments and start them again
///
/// Example: peerctl restart web
#[derive(Debug, Args)]
pub(super) struct RestartArguments {
    /// Deployments: names or ids
    #[arg(required = true, value_name = "DEPLOYMENT", value_parser = parse_reference)]
    deployments: Vec<String>,
}

/// Remove deployments and what they wrote
///
/// Example: peerctl rm web --force
#[derive(Debug, Args)]
pub(super) struct RmArguments {
    /// Deployments: names or ids
    #[arg(required = true, value_name = "DEPLOYMENT", value_parser = parse_reference)]
    deployments: Vec<String>,
    /// Also those that run
    #[arg(short, long)]
    force: bool,
}

/// What `rm --json` prints for each deployment.
#[derive(Debug, Serialize)]
struct Removed {
    removed: DeploymentId,
}

/// Runs `stop`.
pub(super) async fn stop(session: &Session, arguments: StopArguments) -> Result<(), Failure> {
    each(session, arguments.deployments, Method::POST, "/stop").await
}

/// Runs `start`.
pub(super) async fn start(session: &Session, arguments: StartArguments) -> Result<(), Failure> {
    each(session, arguments.deployments, Method::POST, "/start").await
}

/// Runs `restart`.
pub(super) async fn restart(session: &Session, arguments: RestartArguments) -> Result<(), Failure> {
    each(session, arguments.deployments, Method::POST, "/restart").await
}

/// Runs `rm`.
pub(super) async fn rm(session: &Session, arguments: RmArguments) -> Result<(), Failure> {
    each(session, arguments.deployments, Method::DELETE, if arguments.force { "?force=true" } else { "" }).await
}

/// Asks for the same of every deployment. One that fails does not keep the others from it; each problem is printed as it
/// happens, and the first one's status is the command's.
async fn each(session: &Session, deployments: Vec<String>, method: Method, verb: &str) -> Result<(), Failure> {
    let mut first = None;
    for deployment in deployments {
        let path = format!("{}{verb}", path_of(&deployment));
        match one(session, method.clone(), &path, &deployment).await {
            Ok(()) => {}
            Err(Failure::Problem(problem)) => {
                session.output.problem(&problem);
                first.get_or_insert(problem.code.exit_status());
            }
            Err(failure) => return Err(failure),
        }
    }
    first.map_or(Ok(()), |status| Err(Failure::Result(status)))
}

async fn one(session: &Session, method: Method, path: &str, named: &str) -> Result<(), Failure> {
    let removes = method == Method::DELETE;
    let lines = session.client.stream(method, path, None::<&()>).await?;
    let follower = Follower::new(session, lines, None, SILENCE_DEADLINE);
    // Why something failed long ago is no news to whoever removes it.
    let mut follower = if removes { follower.without_states() } else { follower };
    loop {
        match follower.next().await? {
            Progress::Accepted { .. } | Progress::Changed { .. } => {}
            Progress::Done { deployment } => return report(session, &deployment),
            Progress::Removed { deployment } => {
                let removed = Removed { removed: deployment };
                return session.output.result(&removed, |_| format!("{} is removed\n", escape(named)));
            }
            other @ (Progress::Pushed { .. } | Progress::Want { .. } | Progress::Failed(_)) => {
                return Err(unexpected(&other));
            }
        }
    }
}

fn report(session: &Session, deployment: &Deployment) -> Result<(), Failure> {
    let status = &deployment.status;
    if let (peer_proto::deploy::State::Failed, problem) = (status.state, &status.problem) {
        let message = || format!("'{}' failed on {}", status.specification.name, deployment.peer);
        return Err(problem.clone().map_or_else(|| Failure::new(Code::ContainerExited, message()), Into::into));
    }
    session.output.result(deployment, |deployment| {
        let url = status.url.as_ref().map(|url| format!("{}\n", escape(url))).unwrap_or_default();
        format!("{} is {} on {}\n{url}", status.specification.name, status.state, escape(&deployment.peer))
    })
}
