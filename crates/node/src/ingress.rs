//! Joins running deployments to gateways: keeps a lease for each published one, and lets visits in.
//!
//! One task for each gateway holds one lease stream. A lease lives no longer than its stream, so that the loss of either
//! side ends it; a gateway that comes back is told everything again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use peer_compute::engine::docker::DockerEngine;
use peer_compute::room::{Change, Room};
use peer_net::exchange::{Deadline, ExchangeError, read_frame, write_frame};
use peer_net::{InboundStream, Network, OpenError, Stream, Traffic};
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use peer_proto::frame::TUNNEL_FRAME_MAX;
use peer_proto::id::{DeploymentId, Label};
use peer_proto::tunnel::{LeaseReply, LeaseRequest, VisitHeader};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::dispatch::{CONNECT_DEADLINE, join_streams};
use crate::notices::Notices;
use crate::protocols;

const FRAME_DEADLINE: Duration = Duration::from_secs(10);
/// First and longest pause before a lost gateway is tried again.
const PAUSE_FIRST: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// A gateway's answer for one deployment.
type Lease = Result<String, Problem>;
type Leases = BTreeMap<(PeerId, DeploymentId), Lease>;

/// How the tunnel to one gateway stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TunnelState {
    /// Whether the lease stream stands.
    pub connected: bool,
    /// Why not, if that is known.
    pub last_error: Option<String>,
}

/// Leases and visits of this machine.
#[derive(Debug, Clone)]
pub struct Ingress {
    room: Option<Room<DockerEngine>>,
    leases: Arc<watch::Sender<Leases>>,
    tunnels: Arc<watch::Sender<BTreeMap<PeerId, TunnelState>>>,
}

impl Ingress {
    /// Keeps leases at every gateway of the list, as it changes, until `cancel` says so.
    pub fn start(
        network: Network,
        room: Option<Room<DockerEngine>>,
        gateways: watch::Receiver<Arc<Vec<PeerId>>>,
        notices: Notices,
        tasks: &TaskTracker,
        cancel: &CancellationToken,
    ) -> Self {
        let ingress = Self { room: room.clone(), leases: Arc::default(), tunnels: Arc::default() };
        if let Some(room) = room {
            let keeper = Keeper { network, room, ingress: ingress.clone(), notices };
            tasks.spawn(cancel.clone().run_until_cancelled_owned(keep_all(keeper, gateways)));
        }
        ingress
    }

    /// How the tunnel to a gateway stands, and how many names it routes to us.
    pub fn tunnel(&self, gateway: &PeerId) -> (TunnelState, u32) {
        let state = self.tunnels.borrow().get(gateway).cloned().unwrap_or_default();
        let leases = self.leases.borrow();
        let live = leases.iter().filter(|((at, _), lease)| at == gateway && lease.is_ok()).count();
        (state, u32::try_from(live).unwrap_or(u32::MAX))
    }

    /// Why a published deployment that runs has no public address, in words for its owner.
    pub fn why_unpublished(&self, id: DeploymentId) -> Problem {
        let tunnels = self.tunnels.borrow();
        if tunnels.is_empty() {
            let message = "the machine that runs it serves through no gateway; its owner can set one there with \
                 `peerctl gateway add ADDRESS`, and you can reach it now with `peerctl port-forward`";
            return Problem::new(Code::NoGateway, message);
        }
        let refused =
            self.leases.borrow().iter().find_map(|((_, at), lease)| (*at == id).then(|| lease.clone().err())?);
        refused.unwrap_or_else(|| {
            let reason = tunnels.values().find_map(|tunnel| tunnel.last_error.clone()).unwrap_or_default();
            let message = format!("the gateway of the machine that runs it cannot be reached at present: {reason}");
            Problem::new(Code::GatewayRefused, message)
        })
    }

    /// Waits until some gateway routes the deployment; false if none does in time, or there is none to wait for.
    pub async fn wait_until_live(&self, id: DeploymentId, patience: Duration) -> bool {
        if self.tunnels.borrow().values().all(|tunnel| !tunnel.connected) {
            return false;
        }
        let mut leases = self.leases.subscribe();
        let live = leases.wait_for(|leases| leases.iter().any(|((_, at), lease)| *at == id && lease.is_ok()));
        matches!(tokio::time::timeout(patience, live).await, Ok(Ok(_)))
    }

    /// Waits until no gateway routes the deployment any more; says whether that was so in time.
    pub async fn wait_until_released(&self, id: DeploymentId, patience: Duration) -> bool {
        let mut leases = self.leases.subscribe();
        let released = leases.wait_for(|leases| leases.keys().all(|(_, at)| *at != id));
        matches!(tokio::time::timeout(patience, released).await, Ok(Ok(_)))
    }

    /// Lets one visit in: the gateway can name a deployment that it routes for us, and nothing else (SECURITY M17).
    pub async fn visit(&self, inbound: InboundStream) -> Result<(), ExchangeError> {
        let (gateway, mut stream) = (inbound.peer, inbound.stream);
        let header: VisitHeader = read_frame(&mut stream, TUNNEL_FRAME_MAX, Deadline::after(FRAME_DEADLINE)).await?;
        let connected = self.connect(gateway, &header).await;
        if let Err(problem) = &connected {
            tracing::info!(%gateway, deployment = %header.deployment, %problem, "visit refused");
        }
        join_streams(stream, connected).await
    }

    async fn connect(&self, gateway: PeerId, header: &VisitHeader) -> Result<tokio::net::TcpStream, Problem> {
        // A gateway that was never given the lease is told the same as one that names nothing at all.
        let absent = || Problem::new(Code::NoSuchDeployment, "no such deployment is served here");
        let leased = self.leases.borrow().get(&(gateway, header.deployment)).is_some_and(Result::is_ok);
        let room = self.room.as_ref().filter(|_| leased).ok_or_else(absent)?;
        let endpoint = room.endpoint(header.deployment).filter(|endpoint| endpoint.publish).ok_or_else(absent)?;
        endpoint.namespace.connect(endpoint.port, CONNECT_DEADLINE).await.map_err(|error| error.problem())
    }
}

/// What the tasks share.
#[derive(Debug, Clone)]
struct Keeper {
    network: Network,
    room: Room<DockerEngine>,
    ingress: Ingress,
    notices: Notices,
}

/// One task for each gateway in the list; a gateway that leaves the list loses its task, and so its stream and leases.
async fn keep_all(keeper: Keeper, mut gateways: watch::Receiver<Arc<Vec<PeerId>>>) {
    let mut running = tokio::task::JoinSet::new();
    let mut tokens: BTreeMap<PeerId, CancellationToken> = BTreeMap::new();
    loop {
        let wanted = gateways.borrow_and_update().clone();
        tokens.retain(|gateway, token| {
            let stays = wanted.contains(gateway);
            if !stays {
                token.cancel();
            }
            stays
        });
        for gateway in wanted.iter() {
            tokens.entry(*gateway).or_insert_with(|| {
                let token = CancellationToken::new();
                let (keeper, gateway, ended) = (keeper.clone(), *gateway, token.clone());
                running.spawn(async move {
                    let _ = ended.run_until_cancelled(keep(&keeper, gateway)).await;
                    keeper.lost(gateway, None).await;
                    keeper.ingress.tunnels.send_modify(|tunnels| drop(tunnels.remove(&gateway)));
                });
                token
            });
        }
        tokio::select! {
            changed = gateways.changed() => if changed.is_err() { return },
            Some(_) = running.join_next() => {}
        }
    }
}

async fn keep(keeper: &Keeper, gateway: PeerId) {
    let mut pause = PAUSE_FIRST;
    loop {
        let opened = keeper.network.open(gateway, protocols::LEASE, Traffic::Control).await;
        let reason = match opened {
            Ok(stream) => {
                pause = PAUSE_FIRST;
                keeper.set_tunnel(gateway, TunnelState { connected: true, last_error: None });
                match hold(keeper, gateway, stream).await {
                    Ok(()) => "the gateway ended the tunnel".to_owned(),
                    Err(error) => error.to_string(),
                }
            }
            Err(OpenError::RefusedByPeer { .. }) => {
                let me = keeper.network.local_peer_id();
                format!("the gateway refused this machine; to let it in, run there: peergate allow {me}")
            }
            Err(error) => error.to_string(),
        };
        keeper.lost(gateway, Some(reason)).await;
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Keeps the gateway's leases equal to what runs and is published, until the stream ends.
async fn hold(keeper: &Keeper, gateway: PeerId, mut stream: Stream) -> Result<(), ExchangeError> {
    let mut changes = keeper.room.changes();
    loop {
        let wanted: Vec<_> =
            keeper.room.endpoints().into_iter().filter_map(|(id, endpoint)| endpoint.publish.then_some(id)).collect();
        let held: Vec<_> =
            keeper.ingress.leases.borrow().keys().filter(|(at, _)| *at == gateway).map(|(_, id)| *id).collect();
        for id in held.iter().filter(|id| !wanted.contains(id)) {
            release(keeper, gateway, *id, &mut stream).await?;
        }
        for id in wanted.iter().filter(|id| !held.contains(id)) {
            register(keeper, gateway, *id, &mut stream).await?;
        }
        tokio::select! {
            changed = relevant_change(&mut changes) => if changed.is_err() { return Ok(()) },
            // The gateway speaks only when spoken to: anything else, or the end, ends the tunnel.
            _ = read_frame::<LeaseReply, _>(&mut stream, TUNNEL_FRAME_MAX, Deadline::after(Duration::from_hours(24))) => {
                return Ok(());
            }
        }
    }
}

async fn relevant_change(changes: &mut broadcast::Receiver<Change>) -> Result<(), RecvError> {
    match changes.recv().await {
        Ok(_) | Err(RecvError::Lagged(_)) => Ok(()),
        Err(closed) => Err(closed),
    }
}

async fn ask(stream: &mut Stream, request: &LeaseRequest) -> Result<LeaseReply, ExchangeError> {
    write_frame(stream, request, TUNNEL_FRAME_MAX, Deadline::after(FRAME_DEADLINE)).await?;
    read_frame(stream, TUNNEL_FRAME_MAX, Deadline::after(FRAME_DEADLINE)).await
}

async fn register(
    keeper: &Keeper,
    gateway: PeerId,
    id: DeploymentId,
    stream: &mut Stream,
) -> Result<(), ExchangeError> {
    let lease = match ask(stream, &LeaseRequest::Register(id)).await? {
        LeaseReply::Live(url) if is_ours(&url, &keeper.network.local_peer_id(), &id) => Ok(url),
        LeaseReply::Live(_) | LeaseReply::Released => Err(Problem::new(
            Code::GatewayRefused,
            "the gateway gave an address that does not belong to the deployment",
        )),
        LeaseReply::Refused(problem) => Err(problem),
    };
    match &lease {
        Ok(url) => {
            keeper.notices.push("lease_live", Some(gateway.to_string()), Some(id), format!("reachable at {url}"));
            keeper.note_url(id, Some(url.clone())).await;
        }
        Err(problem) => {
            keeper.notices.push("lease_lost", Some(gateway.to_string()), Some(id), problem.message.clone());
        }
    }
    keeper.ingress.leases.send_modify(|leases| drop(leases.insert((gateway, id), lease)));
    Ok(())
}

async fn release(keeper: &Keeper, gateway: PeerId, id: DeploymentId, stream: &mut Stream) -> Result<(), ExchangeError> {
    ask(stream, &LeaseRequest::Release(id)).await?;
    keeper.ingress.leases.send_modify(|leases| drop(leases.remove(&(gateway, id))));
    keeper.notices.push("lease_lost", Some(gateway.to_string()), Some(id), "not routed any more".into());
    Ok(())
}

/// The address must bear the label that this machine and deployment derive, over HTTPS, with a plain host name and port.
fn is_ours(url: &str, provider: &PeerId, id: &DeploymentId) -> bool {
    let Some((label, rest)) = url.strip_prefix("https://").and_then(|host| host.split_once('.')) else { return false };
    let (domain, port) = rest.split_once(':').map_or((rest, None), |(domain, port)| (domain, Some(port)));
    url.len() <= 300
        && label == Label::derive(provider, id).to_string()
        && !domain.is_empty()
        && domain.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
        && port.is_none_or(|port| port.parse::<peer_proto::unit::Port>().is_ok())
}

impl Keeper {
    fn set_tunnel(&self, gateway: PeerId, state: TunnelState) {
        self.ingress.tunnels.send_modify(|tunnels| drop(tunnels.insert(gateway, state)));
    }

    async fn note_url(&self, id: DeploymentId, url: Option<String>) {
        if let Err(error) = self.room.set_url(id, url).await {
            tracing::error!(deployment = %id, %error, "the public address could not be announced");
        }
    }

    /// Forgets everything that this gateway routed.
    async fn lost(&self, gateway: PeerId, reason: Option<String>) {
        let mut ended = Vec::new();
        self.ingress.leases.send_modify(|leases| {
            leases.retain(|(at, id), lease| {
                if *at == gateway && lease.is_ok() {
                    ended.push(*id);
                }
                *at != gateway
            });
        });
        if let Some(reason) = &reason {
            tracing::info!(%gateway, reason, "the tunnel to the gateway is down");
        }
        self.set_tunnel(gateway, TunnelState { connected: false, last_error: reason });
        for id in ended {
            let elsewhere = {
                let leases = self.ingress.leases.borrow();
                leases
                    .iter()
                    .find(|((_, at), lease)| *at == id && lease.is_ok())
                    .and_then(|(_, lease)| lease.clone().ok())
            };
            self.notices.push("lease_lost", Some(gateway.to_string()), Some(id), "the gateway's tunnel is down".into());
            self.note_url(id, elsewhere).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use peer_proto::identity::Identity;

    use super::*;

    #[test]
    fn v8_only_the_derived_label_is_accepted_from_a_gateway() {
        let (provider, id) = (Identity::generate().peer_id(), DeploymentId::random());
        let label = Label::derive(&provider, &id);
        assert!(is_ours(&format!("https://{label}.peer.localhost:8443"), &provider, &id));
        assert!(is_ours(&format!("https://{label}.example.org"), &provider, &id));
        for url in [
            format!("http://{label}.example.org"),
            "https://other.example.org".to_owned(),
            format!("https://{label}.example.org/path"),
            format!("https://{label}.ex\u{1b}ample.org"),
            format!("https://{label}.example.org:99999"),
            format!("https://{label}."),
        ] {
            assert!(!is_ours(&url, &provider, &id), "{url}");
        }
    }
}
