//! The transport and the behaviours, put together. Nothing is announced to anybody: no identify, no discovery.

use std::num::NonZeroU8;
use std::sync::Arc;

use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::Boxed;
use libp2p::core::upgrade::Version;
use libp2p::identity::Keypair;
use libp2p::swarm::NetworkBehaviour;
use libp2p::{PeerId, Swarm, Transport, noise, ping, tcp};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::gate::{HandshakeGate, PolicyGate};
use crate::handler::Streams;
use crate::network::Shared;
use crate::streams::InboundStream;

/// Addresses of one peer that are tried at once.
const DIAL_CONCURRENCY: NonZeroU8 = NonZeroU8::new(4).expect("four is not zero");

/// Field order is the order of judgement: whoever an earlier field refuses costs the later ones nothing.
#[derive(NetworkBehaviour)]
pub(crate) struct Behaviour {
    handshakes: HandshakeGate,
    gate: PolicyGate,
    limits: connection_limits::Behaviour,
    pub(crate) streams: Streams,
    /// Last, because it refuses nobody: a connection that reaches it is in the table.
    ping: ping::Behaviour,
}

/// TCP, Noise (which proves the PeerId), Yamux.
fn transport(keypair: &Keypair, shared: &Arc<Shared>) -> Result<Boxed<(PeerId, StreamMuxerBox)>, noise::Error> {
    let judge = Arc::clone(shared);
    Ok(tcp::tokio::Transport::new(tcp::Config::default())
        .upgrade(Version::V1Lazy)
        .authenticate(noise::Config::new(keypair)?)
        .multiplex_ext(move |peer, _| judge.multiplexing(peer))
        .timeout(shared.options.handshake_timeout)
        .boxed())
}

/// Builds the swarm; its connections run as tasks of `tasks` and end when `kill` is cancelled.
pub(crate) fn build(
    keypair: &Keypair,
    shared: &Arc<Shared>,
    incoming: mpsc::Sender<InboundStream>,
    tasks: &TaskTracker,
    kill: &CancellationToken,
) -> Result<Swarm<Behaviour>, noise::Error> {
    let options = &shared.options;
    let limits = ConnectionLimits::default()
        .with_max_pending_outgoing(Some(options.limits.pending_dials))
        .with_max_established(Some(options.limits.established))
        .with_max_established_per_peer(Some(options.limits.established_per_peer));
    let liveness = ping::Config::new().with_interval(options.ping_interval).with_timeout(options.ping_timeout);
    let behaviour = Behaviour {
        handshakes: HandshakeGate::new(Arc::clone(shared)),
        gate: PolicyGate::new(Arc::clone(shared)),
        limits: connection_limits::Behaviour::new(limits),
        streams: Streams::new(Arc::clone(shared), incoming),
        ping: ping::Behaviour::new(liveness),
    };
    let (tasks, kill) = (tasks.clone(), kill.clone());
    let executor = move |future| {
        tasks.spawn(kill.clone().run_until_cancelled_owned(future));
    };
    // The last protocol of a proposal is used before the remote has agreed; `Proposal` says when that is wanted.
    let config = libp2p::swarm::Config::with_executor(executor)
        .with_substream_upgrade_protocol_override(Version::V1Lazy)
        .with_idle_connection_timeout(options.idle_timeout)
        .with_max_negotiating_inbound_streams(options.limits.negotiating_streams)
        .with_dial_concurrency_factor(DIAL_CONCURRENCY);
    let transport = transport(keypair, shared)?;
    Ok(Swarm::new(transport, behaviour, keypair.public().to_peer_id(), config))
}
