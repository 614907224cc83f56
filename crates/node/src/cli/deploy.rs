//! `deploy`: flags become a [`Specification`], the image is offered, its missing layers travel, and the wait is for
//! `running`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use hyper::Method;
use peer_proto::code::{Code, Problem};
use peer_proto::control::{self, Deployment, Progress};
use peer_proto::deploy::{
    Capability, Demands, Egress, HealthCheck, Limits, RestartPolicy, RuntimeName, Specification, State, User, Variable,
    Writable,
};
use peer_proto::id::Name;
use peer_proto::text::escape;
use peer_proto::unit::{ByteSize, Millicores, Port, Span};
use serde::Serialize;

use super::environment;
use super::failure::Failure;
use super::grants::parse_life;
use super::image::{ImageArgument, ImageArguments, Source, displayed};
use super::transfer::{Follower, Sent};
use super::{Session, parse_reference};

/// Run an image on a peer's machine
///
/// IMAGE is an archive on disk (docker save, or an OCI layout, as a tar file or a directory) or a name in the container
/// engine of this machine. Only layers that the peer lacks travel, over the peer connection; no registry is needed. With
/// --pull the peer fetches the image itself from a registry.
///
/// Flags stand before COMMAND; everything from COMMAND on belongs to the container.
///
/// Example: peerctl deploy web.tar --peer bob --name web --expose 8080 -e GREETING=hello
#[derive(Debug, Args)]
pub(super) struct DeployArguments {
    #[command(flatten)]
    image: ImageArguments,
    /// The peer fetches IMAGE, then registry/name@sha256:…, by itself
    #[arg(long, conflicts_with_all = ["select", "platform"])]
    pull: bool,
    /// Command and its arguments, instead of the image's
    #[arg(trailing_var_arg = true)]
    command: Vec<String>,
    /// Peer to run on: name or id
    #[arg(short, long, value_parser = parse_reference)]
    peer: String,
    /// Name of the deployment [default: the image's base name]
    #[arg(short, long)]
    name: Option<Name>,
    /// Environment variable; may be repeated
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<Variable>,
    /// File of environment variables, one NAME=VALUE a line; may be repeated
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    #[command(flatten)]
    limits: LimitArguments,
    #[command(flatten)]
    privileges: PrivilegeArguments,
    /// TCP port of the container that may be reached from outside
    #[arg(long, value_name = "PORT", allow_hyphen_values = true)]
    expose: Option<Port>,
    /// Give the exposed port no public address; `peerctl port-forward` reaches it
    #[arg(long, requires = "expose")]
    no_publish: bool,
    /// What it may reach outside: none, internet, or HOST:PORT; may be repeated. More than none only as the peer allows
    #[arg(long, value_name = "LEVEL", value_delimiter = ',', default_value = "none", allow_hyphen_values = true)]
    egress: Vec<String>,
    /// Private network that it shares with your other deployments on the peer that name it
    #[arg(long, value_name = "NAME", allow_hyphen_values = true)]
    network: Option<Name>,
    /// What happens when it ends by itself: no, on-failure[:N] or always
    #[arg(long, value_name = "POLICY", default_value_t = RestartPolicy::No)]
    restart: RestartPolicy,
    /// Program to run instead of the image's entrypoint; empty for none
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Path on the exposed port that answers 200 to 399 while all is well
    #[arg(long, value_name = "PATH", requires = "expose")]
    health_path: Option<String>,
    /// Time between health checks
    #[arg(long, value_name = "SPAN", default_value = "30s", requires = "health_path")]
    health_interval: Span,
    /// Failures in a row that make it unhealthy
    #[arg(long, value_name = "N", default_value_t = 3, requires = "health_path", allow_hyphen_values = true)]
    health_retries: u32,
    /// Time between the request to end and the kill, at most 300s
    #[arg(long, value_name = "SPAN", default_value = "10s", allow_hyphen_values = true)]
    stop_timeout: Span,
    /// Longest wait for it to run, not counting uploads; it goes on if the time runs out
    #[arg(long, value_name = "SPAN", default_value = "5m", value_parser = parse_life, allow_hyphen_values = true)]
    timeout: Span,
    /// Do not wait for it to run, only until its image is on its way without this machine
    #[arg(short, long)]
    detach: bool,
}

/// Hard limits of the container.
#[derive(Debug, Clone, Args)]
struct LimitArguments {
    /// Processors, such as 2, 0.5 or 500m
    #[arg(long, visible_alias = "cpus", value_name = "CPUS", default_value = "0.5", allow_hyphen_values = true)]
    cpu: Millicores,
    /// Memory, such as 512m or 2g; there is no swap on top
    #[arg(short, long, value_name = "SIZE", default_value = "256m", allow_hyphen_values = true)]
    memory: ByteSize,
    /// Processes and threads
    #[arg(long, visible_alias = "pids-limit", value_name = "N", default_value = "100", allow_hyphen_values = true)]
    pids: u32,
    /// Open files of each process
    #[arg(long, value_name = "N", default_value = "1024", allow_hyphen_values = true)]
    files: u32,
    /// Writable space on /tmp, which counts as memory [default: 64m, at most half of the memory]
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    scratch: Option<ByteSize>,
    /// Writable path besides /tmp, emptied at each start; it counts as memory; may be repeated
    #[arg(long, value_name = "PATH=SIZE")]
    writable: Vec<Writable>,
}

/// What has to be granted by the peer, and what is demanded of its machine.
#[derive(Debug, Clone, Args)]
struct PrivilegeArguments {
    /// Who it runs as: root, or a user of its own, whatever the image says; root needs a grant [default: private]
    #[arg(short, long, value_name = "USER")]
    user: Option<User>,
    /// Power of root that it keeps, such as chown or setuid; needs a grant; may be repeated
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    cap: Vec<Capability>,
    /// Make the whole image writable, up to so much of the peer's disk; needs a grant
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    writable_root: Option<ByteSize>,
    /// Run it only where users of containers are mapped to others of the host
    #[arg(long)]
    require_userns: bool,
    /// Run it by this runtime of the peer's engine, such as runsc, or not at all
    #[arg(long, value_name = "NAME")]
    runtime: Option<RuntimeName>,
}

impl LimitArguments {
    fn limits(&self) -> Result<Limits, Failure> {
        let taken = self.writable.iter().fold(0, |sum: u64, one| sum.saturating_add(one.size.get()));
        let left = self.memory.get().saturating_sub(taken);
        let usual = Limits::default().scratch.get().min(self.memory.get() / 2).min(left).max(4096);
        let scratch = match self.scratch {
            Some(scratch) => scratch,
            None => ByteSize::new(usual).map_err(|error| Failure::argument(format!("scratch: {error}")))?,
        };
        Ok(Limits { cpu: self.cpu, memory: self.memory, pids: self.pids, files: self.files, scratch })
    }
}

/// What `deploy --json` prints.
#[derive(Debug, Serialize)]
struct Deployed {
    #[serde(flatten)]
    deployment: Box<Deployment>,
    #[serde(flatten)]
    sent: Sent,
}

impl DeployArguments {
    /// The specification that the flags mean.
    fn specification(&self) -> Result<Specification, Failure> {
        let seconds = |field: &str, span: Span| {
            u32::try_from(span.seconds).map_err(|_| Failure::argument(format!("{field} is too long: {span}")))
        };
        let (image, image_name) = (ImageArgument::parse(&self.image.image, self.pull)?, displayed(&self.image.image));
        let name = self.name.clone().or_else(|| image.default_name()).ok_or_else(|| {
            Failure::argument(format!("no name can be made of '{image_name}'; choose one with --name"))
        })?;
        let health = match &self.health_path {
            None => None,
            Some(path) => Some(HealthCheck {
                path: path.clone(),
                interval_seconds: seconds("health check interval", self.health_interval)?,
                retries: self.health_retries,
            }),
        };
        let specification = Specification {
            entrypoint: self.entrypoint.clone().map(|one| if one.is_empty() { vec![] } else { vec![one] }),
            command: self.command.clone(),
            environment: environment::collect(&self.env_file, self.env.clone())?,
            expose: self.expose,
            publish: self.expose.is_some() && !self.no_publish,
            limits: self.limits.limits()?,
            restart: self.restart,
            health,
            stop_timeout_seconds: seconds("stop timeout", self.stop_timeout)?,
            capabilities: self.privileges.cap.iter().copied().collect(),
            user: self.privileges.user.unwrap_or_default(),
            writable: self.limits.writable.clone(),
            writable_root: self.privileges.writable_root,
            demands: Demands {
                user_namespace: self.privileges.require_userns,
                runtime: self.privileges.runtime.clone(),
            },
            egress: self
                .egress
                .join(",")
                .parse::<Egress>()
                .map_err(|error| Failure::argument(format!("--egress: {error}")))?,
            network: self.network.clone(),
            ..Specification::plain(name, image_name)
        };
        specification.check()?;
        Ok(specification)
    }
}

/// Runs `deploy`.
pub(super) async fn run(session: &Session, arguments: DeployArguments) -> Result<(), Failure> {
    // What is wrong with the flags is said before a large image is read.
    let mut specification = arguments.specification()?;
    let source = Source::open(session, &arguments.image, arguments.pull).await?;
    specification.image_name = source.display_name();
    specification.check()?;
    let request = control::Deploy { peer: arguments.peer.clone(), specification, image: source.image() };
    let lines = session.client.stream(Method::POST, "/v1/deployments", Some(&request)).await?;
    let patience = Duration::from_secs(arguments.timeout.seconds);
    let mut follower = Follower::new(session, lines, source.offer(), patience);
    let deployment = loop {
        match follower.next().await? {
            Progress::Done { deployment } => break deployment,
            Progress::Changed { deployment } if arguments.detach && stands_alone(&deployment, arguments.pull) => {
                break deployment;
            }
            Progress::Accepted { .. } | Progress::Changed { .. } => {}
            other => return Err(unexpected(&other)),
        }
    };
    let sent = follower.sent();
    drop(follower);
    report(session, &Deployed { deployment, sent })
}

/// Whether the peer can go on without this machine.
fn stands_alone(deployment: &Deployment, pull: bool) -> bool {
    pull || !matches!(deployment.status.state, State::Pending | State::Fetching)
}

/// The failure of an answer that belongs to another request.
pub(super) fn unexpected(progress: &Progress) -> Failure {
    Failure::new(Code::Internal, format!("peerd answered something else than was asked for: {progress:?}"))
}

fn report(session: &Session, deployed: &Deployed) -> Result<(), Failure> {
    let status = &deployed.deployment.status;
    if status.state == State::Failed {
        let unknown = || Problem::new(Code::ContainerExited, format!("'{}' failed", status.specification.name));
        return Err(status.problem.clone().unwrap_or_else(unknown).into());
    }
    session.output.result(deployed, |deployed| in_words(&deployed.deployment))?;
    if let (State::Paused, Some(problem)) = (status.state, &status.problem) {
        session.output.note(&escape(&problem.message));
    }
    if let Some(hint) = address_hint(&deployed.deployment) {
        session.output.note(&hint);
    }
    Ok(())
}

fn in_words(deployment: &Deployment) -> String {
    let status = &deployment.status;
    let peer = escape(&deployment.peer);
    let url = status.url.as_ref().map(|url| format!("{}\n", escape(url))).unwrap_or_default();
    format!("{} ({}) is {} on {peer}\n{url}", status.specification.name, status.id.short(), status.state)
}

/// How to reach a port that has no public address.
fn address_hint(deployment: &Deployment) -> Option<String> {
    let status = &deployment.status;
    let port = status.specification.expose?;
    if status.url.is_some() || matches!(status.state, State::Stopped | State::Paused) {
        return None;
    }
    let (name, peer) = (&status.specification.name, escape(&deployment.peer));
    let forward = format!("From here: peerctl port-forward {name} {port}");
    if !status.specification.publish {
        return Some(forward);
    }
    Some(match &status.problem {
        Some(problem) if problem.code == Code::NoGateway => {
            format!("No public address: {peer} has no gateway. On {peer}: peerctl gateway add ADDRESS\n{forward}")
        }
        Some(problem) => format!("No public address yet: {}\n{forward}", escape(&problem.message)),
        None => format!("No public address yet: `peerctl status {name}` shows it once it is live.\n{forward}"),
    })
}

#[cfg(test)]
mod tests;
