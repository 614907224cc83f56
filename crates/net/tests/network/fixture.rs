//! Nodes on loopback, with a policy that a test can change, and waits that end when the thing has happened.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{AsyncReadExt, AsyncWriteExt};
use peer_net::{
    Admission, Incoming, Keypair, Limits, Multiaddr, Network, NetworkEvent, Options, PeerId, Policy, Protocol,
    Protocols, Role,
};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinSet;

pub(crate) const CONTROL: Protocol = Protocol::new("/test/control/1");
pub(crate) const BULK: Protocol = Protocol::new("/test/bulk/1");
pub(crate) const JOIN: Protocol = Protocol::new("/test/join/1");

/// Longest wait for something that must happen; reaching it fails the test.
const PATIENCE: Duration = Duration::from_mins(1);

pub(crate) struct Node {
    pub(crate) network: Network,
    pub(crate) incoming: Option<Incoming>,
    pub(crate) policy: watch::Sender<Arc<Policy>>,
    pub(crate) events: broadcast::Receiver<NetworkEvent>,
}

impl Node {
    pub(crate) fn id(&self) -> PeerId {
        self.network.local_peer_id()
    }

    pub(crate) fn address(&self) -> Multiaddr {
        self.network.listen_addresses()[0].clone()
    }

    pub(crate) fn admit(&self, peer: PeerId, role: Role, addresses: Vec<Multiaddr>) {
        self.policy.send_modify(|policy| {
            let mut changed = Policy::clone(policy);
            changed.admitted.insert(peer, Admission { role, addresses });
            *policy = Arc::new(changed);
        });
    }

    pub(crate) fn remove(&self, peer: PeerId) {
        self.policy.send_modify(|policy| {
            let mut changed = Policy::clone(policy);
            changed.admitted.remove(&peer);
            *policy = Arc::new(changed);
        });
    }

    /// Waits for an event that `wanted` accepts.
    pub(crate) async fn event(&mut self, wanted: impl Fn(&NetworkEvent) -> bool) -> NetworkEvent {
        let waiting = async {
            loop {
                let event = self.events.recv().await.unwrap();
                if wanted(&event) {
                    return event;
                }
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.expect("the event never came")
    }

    pub(crate) async fn connected(&mut self, wanted: PeerId) {
        self.event(|event| matches!(event, NetworkEvent::Connected { peer } if *peer == wanted)).await;
    }

    /// Answers every inbound stream with its own bytes until the network ends.
    pub(crate) fn echo(&mut self) -> JoinSet<()> {
        let mut incoming = self.incoming.take().unwrap();
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut streams = JoinSet::new();
            while let Some(inbound) = incoming.next().await {
                streams.spawn(async move {
                    let (reader, mut writer) = inbound.stream.split();
                    futures::io::copy(reader, &mut writer).await.ok();
                    writer.close().await.ok();
                });
            }
        });
        serving
    }
}

pub(crate) fn key(seed: u8) -> Keypair {
    Keypair::ed25519_from_bytes([seed; 32]).unwrap()
}

pub(crate) fn loopback() -> Multiaddr {
    "/ip4/127.0.0.1/tcp/0".parse().unwrap()
}

/// Options for tests: everything comes from one address, and dialling again is quick.
pub(crate) fn options() -> Options {
    Options {
        listen: vec![loopback()],
        limits: Limits {
            pending_handshakes_per_address: 64,
            outbound_streams_to_peer: 1024,
            inbound_streams_per_peer: 1280,
            stream_pace: None,
            ..Limits::default()
        },
        backoff_initial: Duration::from_millis(20),
        backoff_limit: Duration::from_millis(200),
        ..Options::default()
    }
}

pub(crate) async fn node(seed: u8) -> Node {
    node_with(seed, options()).await
}

pub(crate) async fn node_with(seed: u8, options: Options) -> Node {
    let (policy, receiver) = watch::channel(Arc::new(Policy { admitted: HashMap::new() }));
    let protocols = Protocols::none().allow(Role::Peer, &[CONTROL, BULK]).allow(Role::Joiner, &[JOIN]);
    let (network, incoming) = Network::start(key(seed), options, receiver, protocols).await.unwrap();
    let events = network.events();
    Node { network, incoming: Some(incoming), policy, events }
}

/// Two nodes that admit each other; the first one dials.
pub(crate) async fn pair() -> (Node, Node) {
    pair_with(options(), options()).await
}

pub(crate) async fn pair_with(dialling: Options, listening: Options) -> (Node, Node) {
    let (mut dialling, mut listening) = (node_with(1, dialling).await, node_with(2, listening).await);
    listening.admit(dialling.id(), Role::Peer, Vec::new());
    // The policy is followed, not awaited: wait until it is in force before somebody dials.
    until(|| !matches!(listening.network.connection_state(dialling.id()), peer_net::ConnectionState::NotAdmitted))
        .await;
    dialling.admit(listening.id(), Role::Peer, vec![listening.address()]);
    dialling.connected(listening.id()).await;
    listening.connected(dialling.id()).await;
    (dialling, listening)
}

/// Waits until the condition holds.
pub(crate) async fn until(condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect("the condition never held");
}

/// A plain TCP relay to an address: it can be frozen, and keeps what passed through it.
pub(crate) struct Relay {
    pub(crate) address: Multiaddr,
    pub(crate) frozen: watch::Sender<bool>,
    pub(crate) passed: Arc<Mutex<Vec<u8>>>,
    _serving: JoinSet<()>,
}

impl Relay {
    pub(crate) async fn to(address: &Multiaddr) -> Self {
        let target = SocketAddr::from(([127, 0, 0, 1], port(address)));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let own = format!("/ip4/127.0.0.1/tcp/{}", listener.local_addr().unwrap().port()).parse().unwrap();
        let (frozen, passed) = (watch::Sender::new(false), Arc::new(Mutex::new(Vec::new())));
        let (freezing, record) = (frozen.clone(), Arc::clone(&passed));
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut directions = JoinSet::new();
            loop {
                let (here, _) = listener.accept().await.unwrap();
                let there = TcpStream::connect(target).await.unwrap();
                let ((here_in, here_out), (there_in, there_out)) = (here.into_split(), there.into_split());
                directions.spawn(pass(here_in, there_out, freezing.subscribe(), Arc::clone(&record)));
                directions.spawn(pass(there_in, here_out, freezing.subscribe(), Arc::clone(&record)));
            }
        });
        Self { address: own, frozen, passed, _serving: serving }
    }
}

async fn pass(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut frozen: watch::Receiver<bool>,
    record: Arc<Mutex<Vec<u8>>>,
) {
    let mut buffer = [0; 4096];
    while let Ok(read @ 1..) = tokio::io::AsyncReadExt::read(&mut from, &mut buffer).await {
        if frozen.wait_for(|frozen| !frozen).await.is_err() {
            return;
        }
        record.lock().unwrap().extend_from_slice(&buffer[..read]);
        if tokio::io::AsyncWriteExt::write_all(&mut to, &buffer[..read]).await.is_err() {
            return;
        }
    }
}

pub(crate) fn port(address: &Multiaddr) -> u16 {
    let ports = address.iter().filter_map(|component| match component {
        libp2p::multiaddr::Protocol::Tcp(port) => Some(port),
        _ => None,
    });
    ports.last().unwrap()
}
