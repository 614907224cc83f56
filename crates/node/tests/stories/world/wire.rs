//! A peer that has a machine's key and speaks the protocols itself, so that it can send what no daemon of ours would.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use peer_net::exchange::{Deadline, read_frame, read_frame_bytes, write_frame};
use peer_net::{Admission, Incoming, Limits, Network, Options, Policy, Protocol, Protocols, Role, Stream, Traffic};
use peer_node::protocols;
use peer_proto::PeerId;
use peer_proto::code::Code;
use peer_proto::deploy::{Event, LayerHeader, LayerReply, Refusal, Request};
use peer_proto::envelope::{self, Outgoing, open_reply, seal};
use peer_proto::frame::CONTROL_FRAME_MAX;
use peer_proto::id::{Digest, RequestHash, RequestId};
use peer_proto::identity::Identity;
use peer_proto::query::{Answer, Call, Hello, Query};
use peer_proto::unit::Timestamp;
use peer_trust::key_file;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::gate::Gate;
use super::machine::Machine;

const FRAME_MAX: Duration = Duration::from_secs(30);

/// The peer and its open connections.
pub(crate) struct Wire {
    pub(crate) identity: Identity,
    runtime: Runtime,
    network: Network,
    _incoming: Incoming,
    _policy: watch::Sender<Arc<Policy>>,
}

/// The key of a machine, which is not sealed.
pub(crate) fn key_of(machine: &Machine) -> Identity {
    match key_file::load(&machine.data()).unwrap() {
        key_file::Loaded::Open(identity) => identity.key,
        other => panic!("no key in the open: {other:?}"),
    }
}

impl Wire {
    /// Speaks with the key of `machine`, whose daemon must be down, to these others.
    pub(crate) fn of(machine: &Machine, others: &[&Machine]) -> Self {
        Self::with(key_of(machine), others)
    }

    /// Speaks with the key of `machine` without any bound of its own.
    pub(crate) fn unbounded(machine: &Machine, others: &[&Machine]) -> Self {
        let limits = Limits { outbound_streams_to_peer: 4096, negotiating_streams: 512, ..Limits::default() };
        let options = Options { limits, ..Options::default() };
        Self::speaking(key_of(machine), peers(others), options)
    }

    /// Connects from many addresses, over and over, until somebody says that it is over: the last `count` sockets are
    /// held. They say nothing, begin a handshake, or leave it in the middle. Gives how many were made.
    pub(crate) fn hold_sockets(to: &Machine, count: usize, over: &AtomicBool) -> usize {
        use tokio::io::AsyncWriteExt;
        const BEGUN: &[u8] = b"\x13/multistream/1.0.0\n";
        // The first message of a handshake that the other side answers: any 32 bytes are a public key.
        let half = [BEGUN, b"\x07/noise\n\x00\x20", &[9; 32]].concat();
        let port: u16 = to.address.rsplit('/').next().unwrap().parse().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut held = VecDeque::new();
            let mut made = 0;
            while !over.load(Ordering::Relaxed) {
                // Each address may have eight handshakes.
                let [high, low] = u16::try_from((made / 8) % 60_000).unwrap().to_be_bytes();
                let socket = tokio::net::TcpSocket::new_v4().unwrap();
                socket.bind(([127, 1 + high, low, 1], 0).into()).unwrap();
                let connect = socket.connect(([127, 0, 0, 1], port).into());
                let Ok(Ok(mut stream)) = tokio::time::timeout(Duration::from_secs(1), connect).await else { continue };
                let said = [&[][..], BEGUN, &half][made % 3];
                drop(stream.write_all(said).await);
                held.push_back(stream);
                held.drain(..held.len().saturating_sub(count));
                made += 1;
                if made > count {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            }
            made
        })
    }

    /// Opens so many streams as fast as it can, `at_once` at one time, each with a part of a message of which this length is
    /// announced. Gives how many were opened, and the last ones.
    pub(crate) fn open_many(&self, to: &Machine, count: usize, at_once: usize, announced: u32) -> (usize, Vec<Stream>) {
        use futures::AsyncWriteExt;
        const PATIENCE: Duration = Duration::from_secs(1);
        let mut part = announced.to_be_bytes().to_vec();
        // Less than what a stream's window takes, however slowly the other side reads.
        part.resize(250_000, 0);
        let part = Arc::new(part);
        self.runtime.block_on(async {
            let (mut tasks, mut held, mut opened) = (JoinSet::new(), VecDeque::new(), 0);
            for number in 0..count {
                if tasks.len() >= at_once {
                    let stream = tasks.join_next().await.and_then(Result::ok).flatten();
                    opened += usize::from(stream.is_some());
                    held.extend(stream);
                    held.drain(..held.len().saturating_sub(at_once));
                }
                let (network, peer, part) = (self.network.clone(), id_of(to), Arc::clone(&part));
                tasks.spawn(async move {
                    let traffic = if number % 2 == 0 { Traffic::Control } else { Traffic::Bulk };
                    let opening = network.open(peer, protocols::CONTROL, traffic);
                    let mut stream = tokio::time::timeout(PATIENCE, opening).await.ok()?.ok()?;
                    drop(tokio::time::timeout(PATIENCE, stream.write_all(&part)).await);
                    Some(stream)
                });
            }
            held.extend(tasks.join_all().await.into_iter().flatten().inspect(|_| opened += 1));
            (opened, held.into())
        })
    }

    /// Speaks with any key.
    pub(crate) fn with(identity: Identity, others: &[&Machine]) -> Self {
        Self::admitting(identity, peers(others))
    }

    /// Speaks with any key to a gateway.
    pub(crate) fn provider(identity: Identity, gate: &Gate) -> Self {
        let full = gate.address();
        let (address, peer) = full.split_once("/p2p/").unwrap();
        let admission = Admission { role: Role::Gateway, addresses: vec![address.parse().unwrap()] };
        Self::admitting(identity, [(peer.parse().unwrap(), admission)].into())
    }

    fn admitting(identity: Identity, admitted: HashMap<PeerId, Admission>) -> Self {
        Self::speaking(identity, admitted, Options::default())
    }

    fn speaking(identity: Identity, admitted: HashMap<PeerId, Admission>, options: Options) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let policy = watch::Sender::new(Arc::new(Policy { admitted }));
        let start = Network::start(identity.to_keypair(), options, policy.subscribe(), Protocols::none());
        let (network, incoming) = runtime.block_on(start).unwrap();
        Self { identity, runtime, network, _incoming: incoming, _policy: policy }
    }

    /// Opens a stream; the text says why not.
    pub(crate) fn open(&self, to: &Machine, protocol: Protocol) -> Result<Stream, String> {
        self.open_to(id_of(to), protocol)
    }

    /// Opens a stream to a gateway.
    pub(crate) fn open_gate(&self, gate: &Gate, protocol: Protocol) -> Result<Stream, String> {
        self.open_to(gate.info()["peer_id"].as_str().unwrap().parse().unwrap(), protocol)
    }

    fn open_to(&self, peer: PeerId, protocol: Protocol) -> Result<Stream, String> {
        let opened = self.runtime.block_on(self.network.open(peer, protocol, Traffic::Control));
        opened.map_err(|error| error.to_string())
    }

    /// Opens a control stream, with the provider's greeting.
    pub(crate) fn greet(&self, to: &Machine) -> (Stream, Hello) {
        let mut stream = self.open(to, protocols::CONTROL).unwrap();
        let read = read_frame(&mut stream, CONTROL_FRAME_MAX, Deadline::after(FRAME_MAX));
        let hello = self.runtime.block_on(read).unwrap();
        (stream, hello)
    }

    /// Signs a request for the provider's present run, issued so many milliseconds from now.
    pub(crate) fn seal(&self, to: &Machine, request: Request, shift: i64) -> Outgoing {
        let (_, hello) = self.greet(to);
        let now = Timestamp(peer_node::clock::now().0.checked_add_signed(shift).unwrap());
        seal(&self.identity, id_of(to), hello.incarnation, RequestId::random(), now, request)
    }

    /// Sends the bytes of an envelope and gives the whole answer, each line of which must be the provider's.
    pub(crate) fn send(&self, to: &Machine, bytes: &[u8]) -> Vec<Event> {
        self.begin(to, bytes).rest()
    }

    /// Sends the bytes of an envelope; the answer is read later.
    pub(crate) fn begin(&self, to: &Machine, bytes: &[u8]) -> Pending<'_> {
        self.begin_on(self.greet(to).0, to, bytes)
    }

    /// Sends the bytes of an envelope on a stream that is open.
    pub(crate) fn begin_on(&self, mut stream: Stream, to: &Machine, bytes: &[u8]) -> Pending<'_> {
        let call = Call::Signed(bytes.to_vec());
        let write = write_frame(&mut stream, &call, CONTROL_FRAME_MAX, Deadline::after(FRAME_MAX));
        self.runtime.block_on(write).unwrap();
        // Bytes that are no envelope are not answered.
        let hash = envelope::hash_of_bytes(bytes).unwrap_or(RequestHash([0; 32]));
        Pending { wire: self, stream, provider: id_of(to), hash, sequence: 0 }
    }

    /// The refusal that the bytes of an envelope meet.
    pub(crate) fn refused(&self, to: &Machine, bytes: &[u8]) -> Refusal {
        match self.send(to, bytes).pop() {
            Some(Event::Failed(refusal)) => refusal,
            other => panic!("it was not refused: {other:?}"),
        }
    }

    /// The code of the refusal, or none if the provider hung up without a word.
    pub(crate) fn outcome(&self, to: &Machine, bytes: &[u8]) -> Option<Code> {
        match self.send(to, bytes).pop() {
            Some(Event::Failed(refusal)) => Some(refusal.problem.code),
            None => None,
            Some(other) => panic!("it was not refused: {other:?}"),
        }
    }

    /// Asks for something that changes nothing.
    pub(crate) fn query(&self, to: &Machine, query: Query) -> Answer {
        let (mut stream, _) = self.greet(to);
        self.runtime.block_on(async {
            let deadline = Deadline::after(FRAME_MAX);
            write_frame(&mut stream, &Call::Query(query), CONTROL_FRAME_MAX, deadline).await.unwrap();
            read_frame(&mut stream, CONTROL_FRAME_MAX, deadline).await.unwrap()
        })
    }

    /// Sends one frame and reads one, on a stream of any protocol.
    pub(crate) fn exchange<T, A>(&self, to: &Machine, protocol: Protocol, frame: &T) -> Result<A, String>
    where
        T: minicbor::Encode<()>,
        A: minicbor::Encode<()> + for<'b> minicbor::Decode<'b, ()>,
    {
        self.exchange_on(&mut self.open(to, protocol)?, frame)
    }

    /// Sends one frame and reads one.
    pub(crate) fn exchange_on<T, A>(&self, stream: &mut Stream, frame: &T) -> Result<A, String>
    where
        T: minicbor::Encode<()>,
        A: minicbor::Encode<()> + for<'b> minicbor::Decode<'b, ()>,
    {
        self.runtime.block_on(async {
            let deadline = Deadline::after(FRAME_MAX);
            write_frame(stream, frame, CONTROL_FRAME_MAX, deadline).await.map_err(|error| error.to_string())?;
            read_frame(stream, CONTROL_FRAME_MAX, deadline).await.map_err(|error| error.to_string())
        })
    }

    /// Writes one frame.
    pub(crate) fn write<T: minicbor::Encode<()>>(&self, stream: &mut Stream, frame: &T) {
        let write = write_frame(stream, frame, CONTROL_FRAME_MAX, Deadline::after(FRAME_MAX));
        self.runtime.block_on(write).unwrap();
    }

    /// Uses a stream until it is dead, by writing a byte now and then, or by reading whatever comes.
    pub(crate) fn until_dead(&self, mut stream: Stream, writes: bool) -> JoinHandle<Instant> {
        self.runtime.spawn(async move {
            use futures::{AsyncReadExt, AsyncWriteExt};
            let mut buffer = [0; 4096];
            loop {
                let alive = if writes {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    stream.write_all(b"x").await.is_ok() && stream.flush().await.is_ok()
                } else {
                    stream.read(&mut buffer).await.is_ok_and(|count| count > 0)
                };
                if !alive {
                    return Instant::now();
                }
            }
        })
    }

    /// When that was.
    pub(crate) fn died(&self, task: JoinHandle<Instant>) -> Instant {
        self.runtime
            .block_on(async { tokio::time::timeout(FRAME_MAX, task).await })
            .expect("it is still alive")
            .unwrap()
    }

    /// Sends a layer's bytes and gives the verdict.
    pub(crate) fn layer(&self, to: &Machine, request: RequestHash, layer: Digest, bytes: &[u8]) -> LayerReply {
        let mut stream = self.open(to, protocols::LAYERS).unwrap();
        self.runtime.block_on(async {
            use futures::AsyncWriteExt;
            let deadline = Deadline::after(FRAME_MAX);
            write_frame(&mut stream, &LayerHeader { request, layer }, CONTROL_FRAME_MAX, deadline).await.unwrap();
            let first: LayerReply = read_frame(&mut stream, CONTROL_FRAME_MAX, deadline).await.unwrap();
            let LayerReply::From(offset) = first else { return first };
            stream.write_all(&bytes[usize::try_from(offset).unwrap()..]).await.unwrap();
            stream.flush().await.unwrap();
            read_frame(&mut stream, CONTROL_FRAME_MAX, deadline).await.unwrap()
        })
    }
}

/// An answer under way.
pub(crate) struct Pending<'a> {
    wire: &'a Wire,
    stream: Stream,
    provider: PeerId,
    pub(crate) hash: RequestHash,
    sequence: u32,
}

impl Pending<'_> {
    /// The next line; none after the end.
    pub(crate) fn next(&mut self) -> Option<Event> {
        let read = read_frame_bytes(&mut self.stream, CONTROL_FRAME_MAX, Deadline::after(FRAME_MAX));
        let bytes = self.wire.runtime.block_on(read).ok()?;
        let me = self.wire.identity.peer_id();
        let reply = open_reply(&bytes, &self.provider, &me, self.hash, self.sequence).unwrap();
        self.sequence += 1;
        Some(reply.event)
    }

    /// All lines up to the final one.
    pub(crate) fn rest(mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(event) = self.next() {
            let last = event.is_final();
            events.push(event);
            if last {
                break;
            }
        }
        events
    }
}

fn peers(others: &[&Machine]) -> HashMap<PeerId, Admission> {
    let admitted = others.iter().map(|other| {
        let admission = Admission { role: Role::Peer, addresses: vec![other.address.parse().unwrap()] };
        (id_of(other), admission)
    });
    admitted.collect()
}

/// The PeerId of a machine.
fn id_of(machine: &Machine) -> PeerId {
    machine.peer_id.parse().unwrap()
}
