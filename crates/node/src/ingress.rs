//! Joins running deployments to gateways: keeps a lease for each published one, and lets visits in.
//!
//! One task for each gateway holds one lease stream. A lease lives no longer than its stream, so that the loss of either
//! side ends it; a gateway that comes back is told everything again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::{AsyncRead, AsyncReadExt as _};
use peer_compute::connector::Connection;
use peer_compute::room::{Change, Endpoint, Room};
use peer_compute::runner::RunnerEngine;
use peer_net::exchange::{Deadline, ExchangeError, read_frame, write_frame};
use peer_net::{InboundStream, Network, OpenError, Options, Stream, Traffic, back_off};
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use peer_proto::frame::TUNNEL_FRAME_MAX;
use peer_proto::id::{DeploymentId, Label};
use peer_proto::tunnel::{LeaseReply, LeaseRequest, VisitHeader};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::bandwidth::{Bandwidth, Pace};
use crate::dispatch::{CONNECT_DEADLINE, join_streams};
use crate::notices::Notices;
use crate::protocols;
use crate::quota::Quotas;

const FRAME_DEADLINE: Duration = Duration::from_secs(10);
/// First and longest pause before a lost gateway is tried again.
const PAUSE_FIRST: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Pause before a gateway is asked again for a name that it refused.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);

/// A gateway's answer for one deployment.
type Lease = Result<String, Problem>;
type Leases = BTreeMap<(PeerId, DeploymentId), Lease>;

/// Why a tunnel that stood is gone.
#[derive(Debug, thiserror::Error)]
enum TunnelEnd {
    #[error("the gateway ended the tunnel")]
    Closed,
    #[error("the gateway sent something that nobody had asked for")]
    Unasked,
    #[error("this machine's deployments cannot be followed any more")]
    RoomClosed,
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
}

/// How the tunnel to one gateway stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TunnelState {
    /// Whether the lease stream stands.
    pub connected: bool,
    /// Why not, if that is known.
    pub last_error: Option<String>,
}

/// What each owner's visitors may take of this machine.
#[derive(Debug, Clone)]
pub struct Shares {
    /// Connections into containers.
    pub quotas: Arc<Quotas>,
    /// Bytes per second.
    pub bandwidth: Arc<Bandwidth>,
}

/// Leases and visits of this machine.
#[derive(Debug, Clone)]
pub struct Ingress {
    room: Option<Room<RunnerEngine>>,
    shares: Shares,
    leases: Arc<watch::Sender<Leases>>,
    tunnels: Arc<watch::Sender<BTreeMap<PeerId, TunnelState>>>,
}

impl Ingress {
    /// Keeps leases at every gateway of the list, as it changes, until `cancel` says so.
    pub fn start(
        network: Network,
        room: Option<Room<RunnerEngine>>,
        gateways: watch::Receiver<Arc<Vec<PeerId>>>,
        notices: Notices,
        shares: Shares,
        tasks: &TaskTracker,
        cancel: &CancellationToken,
    ) -> Self {
        let ingress = Self { room: room.clone(), shares, leases: Arc::default(), tunnels: Arc::default() };
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
        let (connected, endpoint) = match connected {
            Ok((container, endpoint)) => (Ok(container), Some(endpoint)),
            Err(problem) => (Err(problem), None),
        };
        let closed = endpoint.as_ref().map(|endpoint| endpoint.closed.clone()).unwrap_or_default();
        // It is the deployment's owner who brings visitors.
        let pace = Pace::of(&self.shares.bandwidth, endpoint.map_or(gateway, |endpoint| endpoint.owner));
        // Dropping the stream resets it, which the gateway tells its visitor: one of what is stopped or paused must not wait for a program that says nothing.
        closed.run_until_cancelled(join_streams(stream, connected, &pace)).await.unwrap_or(Err(ExchangeError::Ended))
    }

    async fn connect(&self, gateway: PeerId, header: &VisitHeader) -> Result<(Connection, Endpoint), Problem> {
        // A gateway that was never given the lease is told the same as one that names nothing at all.
        let absent = || Problem::new(Code::NoSuchDeployment, "no such deployment is served here");
        let leased = self.leases.borrow().get(&(gateway, header.deployment)).is_some_and(Result::is_ok);
        let room = self.room.as_ref().filter(|_| leased).ok_or_else(absent)?;
        if let Some(problem) = room.paused(header.deployment) {
            return Err(problem);
        }
        let endpoint = room.endpoint(header.deployment).filter(|endpoint| endpoint.publish).ok_or_else(absent)?;
        // Whoever visits: one owner's containers that answer slowly must not keep those of others waiting.
        let share = self.shares.quotas.of(endpoint.owner);
        let _turn = share.connect().await;
        let connected = endpoint.network.connect(endpoint.port, CONNECT_DEADLINE).await;
        connected.map(|container| (container, endpoint.clone())).map_err(|error| error.problem())
    }
}

/// What the tasks share.
#[derive(Debug, Clone)]
struct Keeper {
    network: Network,
    room: Room<RunnerEngine>,
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
    let pauses = Options { backoff_initial: PAUSE_FIRST, backoff_limit: PAUSE_MAX, ..Options::default() };
    let mut failures = 0_u32;
    loop {
        let opened = keeper.network.open(gateway, protocols::LEASE, Traffic::Control).await;
        let reason = match opened {
            Ok(stream) => {
                failures = 0;
                keeper.set_tunnel(gateway, TunnelState { connected: true, last_error: None });
                hold(keeper, gateway, stream).await.to_string()
            }
            Err(OpenError::RefusedByPeer { .. }) => {
                let me = keeper.network.local_peer_id();
                format!("the gateway refused this machine; to let it in, run there: peergate allow {me}")
            }
            Err(error) => error.to_string(),
        };
        keeper.lost(gateway, Some(reason)).await;
        tokio::time::sleep(back_off(&pauses, failures)).await;
        failures = failures.saturating_add(1);
    }
}

/// Keeps the gateway's leases equal to what runs and is published, until the tunnel ends.
async fn hold(keeper: &Keeper, gateway: PeerId, mut stream: Stream) -> TunnelEnd {
    let mut changes = keeper.room.changes();
    let mut ask_again = None;
    loop {
        let retry = ask_again.is_some_and(|moment| moment <= Instant::now());
        let refused = match agree(keeper, gateway, retry, &mut stream).await {
            Ok(refused) => refused,
            Err(error) => return error.into(),
        };
        ask_again = match ask_again {
            _ if !refused => None,
            Some(moment) if !retry => Some(moment),
            _ => Some(Instant::now() + REFUSED_PAUSE),
        };
        tokio::select! {
            changed = relevant_change(&mut changes) => if changed.is_err() { return TunnelEnd::RoomClosed },
            () = until(ask_again) => {}
            end = until_it_speaks(&mut stream) => return end,
        }
    }
}

/// Releases and registers what has changed; says whether the gateway refuses a name that we want.
async fn agree(keeper: &Keeper, gateway: PeerId, retry: bool, stream: &mut Stream) -> Result<bool, ExchangeError> {
    let wanted = keeper.room.published();
    let held: BTreeMap<DeploymentId, bool> = {
        let leases = keeper.ingress.leases.borrow();
        leases.iter().filter(|((at, _), _)| *at == gateway).map(|((_, id), lease)| (*id, lease.is_ok())).collect()
    };
    let due = due(&wanted, &held, retry);
    for id in due.release {
        release(keeper, gateway, id, stream).await?;
    }
    for id in due.register {
        register(keeper, gateway, id, stream).await?;
    }
    let leases = keeper.ingress.leases.borrow();
    Ok(leases.iter().any(|((at, _), lease)| *at == gateway && lease.is_err()))
}

/// What the gateway has to be told.
#[derive(Debug, Default, PartialEq, Eq)]
struct Due {
    release: Vec<DeploymentId>,
    register: Vec<DeploymentId>,
}

/// Compares what is wanted with the gateway's answers, of which `true` is a live name and `false` a refusal. What it
/// refused is asked for again when it is time, or when a release has made room.
fn due(wanted: &[DeploymentId], held: &BTreeMap<DeploymentId, bool>, retry: bool) -> Due {
    let release: Vec<_> = held.keys().copied().filter(|id| !wanted.contains(id)).collect();
    let again = retry || release.iter().any(|id| held[id]);
    let asks = |id: &DeploymentId| held.get(id).is_none_or(|live| !live && again);
    Due { register: wanted.iter().copied().filter(asks).collect(), release }
}

/// Waits until the moment; for ever if there is none.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// Waits, however long that takes, until the stream ends or the gateway says something, which it may only as an answer.
/// Cancelling it loses nothing. The connection's own liveness checks end the stream when the gateway is gone.
async fn until_it_speaks<S: AsyncRead + Unpin>(stream: &mut S) -> TunnelEnd {
    match stream.read(&mut [0]).await {
        Ok(0) => TunnelEnd::Closed,
        Ok(_) => TunnelEnd::Unasked,
        Err(error) => ExchangeError::from(error).into(),
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
        // A refusal that is repeated is no news.
        Err(problem) if keeper.ingress.leases.borrow().get(&(gateway, id)) != Some(&lease) => {
            keeper.notices.push("lease_lost", Some(gateway.to_string()), Some(id), problem.message.clone());
        }
        Err(_) => {}
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
#[expect(clippy::unwrap_used, reason = "a failing step is a failing test")]
mod tests {
    use peer_proto::identity::Identity;
    use tokio_util::compat::TokioAsyncReadCompatExt as _;

    use super::*;

    #[test]
    fn refused_names_are_asked_for_again() {
        let [live, refused, new, gone] = [0; 4].map(|_| DeploymentId::random());
        let held = BTreeMap::from([(live, true), (refused, false)]);
        let wanted = [live, refused, new];
        assert_eq!(due(&wanted, &held, false), Due { release: vec![], register: vec![new] });
        assert_eq!(due(&wanted, &held, true), Due { release: vec![], register: vec![refused, new] });
        let full = BTreeMap::from([(gone, true), (refused, false)]);
        assert_eq!(due(&[refused], &full, false), Due { release: vec![gone], register: vec![refused] });
        let never_had = BTreeMap::from([(gone, false), (refused, false)]);
        assert_eq!(due(&[refused], &never_had, false), Due { release: vec![gone], register: vec![] });
    }

    #[tokio::test]
    async fn quiet_tunnel_stands_until_it_ends_or_speaks_unasked() {
        let (mut ours, theirs) = tokio::io::duplex(8);
        let mut stream = (&mut ours).compat();
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(std::pin::pin!(until_it_speaks(&mut stream)).poll(&mut context).is_pending());
        drop(theirs);
        assert!(matches!(until_it_speaks(&mut stream).await, TunnelEnd::Closed));
        let (ours, mut theirs) = tokio::io::duplex(8);
        tokio::io::AsyncWriteExt::write_all(&mut theirs, &[0]).await.unwrap();
        let end = until_it_speaks(&mut ours.compat()).await;
        assert!(matches!(end, TunnelEnd::Unasked) && end.to_string() != TunnelEnd::Closed.to_string());
    }

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
