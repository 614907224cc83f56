//! The machine as others see it: identity, network, and the room that runs their containers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use peer_compute::room::{self, Room};
use peer_compute::runner::RunnerEngine;
use peer_net::{Network, NetworkEvent, Options, RefusalReason};
use peer_proto::card::SignedCard;
use peer_state::audit::{self, Entry, Outcome};
use peer_state::data_dir;
use peer_state::durable::FileError;
use peer_trust::key_file::MachineIdentity;
use peer_trust::tally::{Line, Tally};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::daemon::Daemon;
use crate::ingress::{Ingress, Shares};
use crate::introduction::Introductions;
use crate::policy::Inputs;
use crate::refusals::{Source, refused_connections};
use crate::requester::Requester;
use crate::{card, clock, dispatch, health, protocols, statements, withdrawal};

/// How often counted refusals are looked at.
const REFUSALS_PAUSE: Duration = Duration::from_secs(5);
/// Longest wait for the tasks of a node that shuts down.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the node does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The network.
    #[error(transparent)]
    Network(#[from] peer_net::StartError),
    /// The room that runs containers.
    #[error(transparent)]
    Room(#[from] room::StartError),
    /// A directory.
    #[error(transparent)]
    File(#[from] FileError),
}

/// The parts that exist once there is an identity.
#[derive(Debug)]
pub struct Node {
    /// Key, name and recovery key.
    pub identity: MachineIdentity,
    /// Connections to peers and gateways.
    pub network: Network,
    /// Invitations that are being answered.
    pub introductions: Introductions,
    /// Containers of others; absent if this machine runs none.
    pub room: Option<Room<RunnerEngine>>,
    /// Leases and visits.
    pub ingress: Ingress,
    /// Our deployments on other machines.
    pub requester: Requester,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// This machine's architecture in the notation of container images.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        other => other,
    }
}

impl Node {
    /// Takes up what runs here, opens the network, and serves peers.
    pub async fn start(daemon: &Arc<Daemon>, identity: MachineIdentity) -> Result<Arc<Self>, StartError> {
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let introductions = Introductions::default();
        let inputs = Inputs {
            trust: daemon.trust.clone(),
            gateways: daemon.gateways.clone(),
            answered: introductions.watch(),
            closed: daemon.closed.subscribe(),
            me: identity.key.peer_id(),
        };
        let (sender, policy) = watch::channel(Arc::new(inputs.policy()));
        let settings = &daemon.settings;
        let options =
            Options { listen: settings.listen.clone(), limits: settings.limits.clone(), ..Options::default() };
        let keypair = identity.key.to_keypair();
        let (network, incoming) = Network::start(keypair, options, policy, protocols::offered()).await?;
        let events = network.events();
        let room = match start_room(daemon).await {
            Ok(room) => room,
            Err(error) => {
                network.shutdown().await;
                return Err(error);
            }
        };
        let gateways = daemon.gateways.watch_peers();
        let notices = daemon.notices.clone();
        let shares = Shares { quotas: daemon.quotas.clone(), bandwidth: daemon.bandwidth.clone() };
        let ingress = Ingress::start(network.clone(), room.clone(), gateways, notices, shares, &tasks, &stop);
        let requester = Requester::new(
            network.clone(),
            identity.key.clone(),
            daemon.database.clone(),
            daemon.trust.clone(),
            daemon.closed.subscribe(),
        );
        let node = Arc::new(Self {
            identity,
            network,
            introductions,
            room,
            ingress,
            requester,
            tasks: tasks.clone(),
            stop: stop.clone(),
        });
        tasks.spawn(stop.clone().run_until_cancelled_owned(inputs.follow(sender)));
        tasks.spawn(stop.clone().run_until_cancelled_owned(watch_network(daemon.clone(), events)));
        if let Some(room) = &node.room {
            tasks.spawn(stop.clone().run_until_cancelled_owned(watch_room(daemon.clone(), room.changes())));
            let checks = health::check_all(room.clone(), room.changes());
            tasks.spawn(stop.clone().run_until_cancelled_owned(checks));
        }
        let ending = withdrawal::follow(daemon.clone(), node.clone());
        tasks.spawn(stop.clone().run_until_cancelled_owned(ending));
        let spreading = statements::spread(daemon.clone(), node.clone(), node.network.events());
        tasks.spawn(stop.clone().run_until_cancelled_owned(spreading));
        let serving = dispatch::serve(daemon.clone(), node.clone(), incoming, tasks.clone(), stop.clone());
        tasks.spawn(serving);
        Ok(node)
    }

    /// Runs something that ends with the node at the latest.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(self.stop.clone().run_until_cancelled_owned(work));
    }

    /// The signed card of this machine as it is now.
    pub fn card(&self, daemon: &Daemon) -> SignedCard {
        card::sign(&self.identity, &daemon.settings, &self.network, clock::now())
    }

    /// Ends in order: leases and streams, then connections, then the room. Containers are left running.
    pub async fn shutdown(&self) {
        self.stop.cancel();
        self.tasks.close();
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, self.tasks.wait()).await.is_err() {
            tracing::warn!(tasks = self.tasks.len(), "some tasks did not end in time");
        }
        self.network.clone().shutdown().await;
        if let Some(room) = &self.room
            && tokio::time::timeout(SHUTDOWN_TIMEOUT, room.shutdown()).await.is_err()
        {
            tracing::warn!("some deployments were still being worked on; the next start takes them up");
        }
    }
}

async fn start_room(daemon: &Daemon) -> Result<Option<Room<RunnerEngine>>, StartError> {
    let Some(channel) = &daemon.runner else { return Ok(None) };
    let engine = RunnerEngine::new(channel.clone());
    let spool = daemon.data_dir.join("spool");
    data_dir::create_private(&spool)?;
    let options = room::Options {
        offer: daemon.settings.offer,
        spool,
        image_size_max: daemon.settings.image_size_max,
        transfer_patience: Duration::from_secs(daemon.settings.transfer_patience.seconds),
        image_keep_milliseconds: daemon.settings.image_keep.seconds.saturating_mul(1000),
        wall: daemon.settings.wall.clone(),
        clock: clock::now,
        steady_clock: clock::steady,
    };
    Ok(Some(Room::start(daemon.database.clone(), engine, options).await?))
}

/// Tells what happens to the deployments on this machine.
async fn watch_room(daemon: Arc<Daemon>, mut changes: broadcast::Receiver<room::Change>) {
    loop {
        match changes.recv().await {
            Ok(change) => {
                let message = match &change.status {
                    Some(status) => format!("'{}' is {}", status.specification.name, status.state),
                    None => "removed".to_owned(),
                };
                let owner = Some(change.owner.to_string());
                daemon.notices.push("deployment_changed", owner, Some(change.id), message);
            }
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return,
        }
    }
}

/// Tells and audits what happens at the gate. Refusals are counted, so that a flood of them costs little (V1).
async fn watch_network(daemon: Arc<Daemon>, mut events: broadcast::Receiver<NetworkEvent>) {
    let mut refusals = refused_connections();
    let mut pause = tokio::time::interval(REFUSALS_PAUSE);
    loop {
        let now = Instant::now();
        let lines: Vec<Line<Source>> = tokio::select! {
            event = events.recv() => match event {
                Ok(event) => take(&daemon, &mut refusals, event, now).into_iter().collect(),
                Err(RecvError::Lagged(missed)) => {
                    let detail = "events came faster than they could be looked at".to_owned();
                    refusals.note(Source::Others, missed, detail, now).into_iter().collect()
                }
                Err(RecvError::Closed) => return,
            },
            _ = pause.tick() => refusals.due(now),
        };
        for line in lines {
            write(&daemon, line).await;
        }
    }
}

fn take(daemon: &Daemon, refusals: &mut Tally<Source>, event: NetworkEvent, now: Instant) -> Option<Line<Source>> {
    let tell =
        |kind, peer: &peer_proto::PeerId, message| daemon.notices.push(kind, Some(peer.to_string()), None, message);
    match event {
        NetworkEvent::Connected { peer } => {
            tell("peer_connected", &peer, format!("{} is connected", daemon.name_of(&peer)));
        }
        NetworkEvent::Disconnected { peer, reason } => {
            let message = format!("the connection with {} is over: {reason}", daemon.name_of(&peer));
            tell("peer_disconnected", &peer, message);
        }
        NetworkEvent::RefusedByPeer { peer, address } => {
            let message = format!("{} at {address} refused us; it has not added this machine", daemon.name_of(&peer));
            tell("peer_refused", &peer, message);
        }
        NetworkEvent::Refused { peer, address, reason } => {
            let who = peer.map_or_else(|| "somebody".to_owned(), |peer| peer.to_string());
            let why = match reason {
                RefusalReason::NotAdmitted => "it is not in the trust list",
                RefusalReason::TooManyHandshakes => "too many handshakes are in progress",
                RefusalReason::TooManyConnections => "too many connections are open",
            };
            return refusals.note(Source::of(&address), 1, format!("{who} from {address}: {why}"), now);
        }
        NetworkEvent::WrongPeer { expected, obtained, address } => {
            let detail = format!("{obtained} answered at {address} instead of {}", daemon.name_of(&expected));
            return refusals.note(Source::WrongKey(expected), 1, detail, now);
        }
    }
    None
}

async fn write(daemon: &Daemon, line: Line<Source>) {
    let times = if line.count == 1 { String::new() } else { format!(" ({} times since the last line)", line.count) };
    let detail = format!("{}{times}", line.detail);
    daemon.notices.push("peer_refused", None, None, format!("a connection was refused: {detail}"));
    let (actor, outcome) = (line.kind.to_string(), Outcome::Refused(line.kind.threat()));
    let entry = Entry { at: clock::now(), actor, action: "connect".into(), outcome, detail };
    if let Err(error) = daemon.database.write(move |tx| audit::append(tx, &entry)).await {
        tracing::error!(%error, "refused connections could not be audited");
    }
}
