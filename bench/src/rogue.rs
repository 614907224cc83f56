//! A friend who has turned: a program with the key of a trusted peer, which obeys no bound of its own.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{AsyncReadExt, AsyncWriteExt};
use peer_net::{Admission, Incoming, Limits, Network, Options, Policy, Protocol, Protocols, Role, Traffic};
use peer_node::protocols;
use peer_proto::{
    PeerId,
    frame::{CONTROL_FRAME_MAX, encode},
    query::{Call, Query},
};
use peer_trust::key_file::{self, Loaded};
use tokio::{runtime::Runtime, sync::watch, task::JoinSet};

use crate::Failure;

/// Exchanges that are under way at one time.
const AT_ONCE: usize = 64;
/// Longest wait for one of them.
const EXCHANGE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(10);

/// The program. Its connections end with it.
pub(crate) struct Rogue {
    victim: PeerId,
    runtime: Runtime,
    network: Network,
    _incoming: Incoming,
    _policy: watch::Sender<Arc<Policy>>,
}

impl Rogue {
    /// Takes the key of a friend whose daemon is down.
    pub(crate) fn new(data_dir: &Path, victim: &str, address: &str) -> Result<Self, Failure> {
        let Loaded::Open(identity) = key_file::load(data_dir)? else { return Err("no key in the open".into()) };
        let victim: PeerId = victim.parse()?;
        let admission = Admission { role: Role::Peer, addresses: vec![address.parse()?] };
        let policy = watch::Sender::new(Arc::new(Policy { admitted: [(victim, admission)].into() }));
        let limits = Limits { outbound_streams_to_peer: 4096, negotiating_streams: 512, ..Limits::default() };
        let options = Options { limits, ..Options::default() };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let start = Network::start(identity.key.to_keypair(), options, policy.subscribe(), Protocols::none());
        let (network, incoming) = runtime.block_on(start)?;
        Ok(Self { victim, runtime, network, _incoming: incoming, _policy: policy })
    }

    /// Asks, forges, and sends what is too long or nothing at all, as fast as it is taken, until somebody says that it is
    /// over. Gives the number of exchanges.
    pub(crate) fn flood(&self, over: &AtomicBool) -> u64 {
        let forged = Call::Signed(encode(&Query::List));
        let calls = [
            (protocols::CONTROL, encode(&Call::Query(Query::List))),
            (protocols::CONTROL, encode(&forged)),
            (protocols::CONTROL, encode(&Call::Query(Query::Capacity))),
            (protocols::CONTROL, vec![0; CONTROL_FRAME_MAX]),
            (protocols::LAYERS, vec![0; 70]),
            (protocols::LOGS, vec![0; 70]),
            (protocols::FORWARD, vec![0; 70]),
        ];
        let calls = calls.map(|(protocol, call)| (protocol, Arc::new(framed(&call))));
        let done = Arc::new(AtomicU64::new(0));
        self.runtime.block_on(async {
            let mut tasks = JoinSet::new();
            for (protocol, call) in calls.iter().cycle().take(AT_ONCE) {
                let repeated =
                    repeat(self.network.clone(), self.victim, *protocol, Arc::clone(call), Arc::clone(&done));
                tasks.spawn(repeated);
            }
            while !over.load(Ordering::Relaxed) {
                tokio::time::sleep(PAUSE).await;
            }
            tasks.shutdown().await;
        });
        done.load(Ordering::Relaxed)
    }
}

/// The bytes of a message behind their length.
fn framed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    [&length.to_be_bytes(), message].concat()
}

async fn repeat(network: Network, victim: PeerId, protocol: Protocol, call: Arc<Vec<u8>>, done: Arc<AtomicU64>) {
    loop {
        let Ok(mut stream) = network.open(victim, protocol, Traffic::Control).await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let exchange = async {
            stream.write_all(&call).await?;
            stream.close().await?;
            stream.read_to_end(&mut Vec::new()).await
        };
        // Refused or answered, it was work for the other side.
        drop(tokio::time::timeout(EXCHANGE, exchange).await);
        done.fetch_add(1, Ordering::Relaxed);
    }
}
