//! The resolver of one network: the only thing on the host that a guest with a way out can talk to.
//!
//! It listens at the bridge's address, asks the host's own resolvers, and admits the addresses of listed hosts before the
//! guest is told of them.

pub mod message;
mod upstream;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;

use self::message::{Asked, Policy, QUESTION_MAX, Question, Told, read_question};
pub(crate) use self::upstream::Upstream;
use super::ranges::Range;
use crate::engine::ResolverSockets;

/// Questions of one network under way at a time.
const QUESTIONS_MAX: usize = 64;
/// Connections of one network at a time.
const CONNECTIONS_MAX: usize = 16;
/// Questions of one network in a second, and how many at once.
const RATE: NonZeroU32 = NonZeroU32::new(50).expect("not zero");
const BURST: NonZeroU32 = NonZeroU32::new(200).expect("not zero");
/// How long a connection may be silent.
const IDLE: Duration = Duration::from_secs(10);

/// Asks for a network's containers to be let through to these addresses, at these ports, for so many seconds.
#[derive(Debug)]
pub(crate) struct AdmitRequest {
    pub(crate) network: u16,
    pub(crate) addresses: Vec<Ipv4Addr>,
    pub(crate) ports: Vec<u16>,
    pub(crate) seconds: u64,
    /// Told whether they are.
    pub(crate) done: oneshot::Sender<bool>,
}

/// One network's resolver.
#[derive(Debug)]
pub(crate) struct Resolver {
    pub(crate) network: u16,
    pub(crate) subnet: Range,
    pub(crate) policy: Policy,
    pub(crate) upstream: Arc<Upstream>,
    pub(crate) admissions: mpsc::Sender<AdmitRequest>,
}

impl Resolver {
    /// Answers until it is dropped.
    pub(crate) async fn serve(self, sockets: ResolverSockets) -> std::io::Result<()> {
        let (datagrams, connections) = (sockets.datagrams, sockets.connections);
        let datagrams = Arc::new(UdpSocket::from_std(datagrams)?);
        let connections = TcpListener::from_std(connections)?;
        let serving = Arc::new(Serving {
            resolver: self,
            questions: Semaphore::new(QUESTIONS_MAX),
            rate: RateLimiter::direct(Quota::per_second(RATE).allow_burst(BURST)),
        });
        // Dropped with this future, which ends every task in it.
        let mut tasks = JoinSet::new();
        let mut streams = JoinSet::new();
        let mut buffer = vec![0; QUESTION_MAX + 1];
        loop {
            tokio::select! {
                received = datagrams.recv_from(&mut buffer) => {
                    let Ok((length, from)) = received else { continue };
                    if serving.is_member(from) && tasks.len() < QUESTIONS_MAX {
                        let (serving, socket, bytes) = (serving.clone(), datagrams.clone(), buffer[..length].to_vec());
                        tasks.spawn(async move {
                            if let Some(answer) = serving.answer(&bytes, true).await {
                                drop(socket.send_to(&answer, from).await);
                            }
                        });
                    }
                }
                accepted = connections.accept() => {
                    let Ok((stream, from)) = accepted else {
                        // Out of descriptors: the others must be able to end first.
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    };
                    if serving.is_member(from) && streams.len() < CONNECTIONS_MAX {
                        let serving = serving.clone();
                        streams.spawn(async move { drop(serving.converse(stream).await) });
                    }
                }
                Some(_) = tasks.join_next() => {}
                Some(_) = streams.join_next() => {}
            }
        }
    }
}

#[derive(Debug)]
struct Serving {
    resolver: Resolver,
    questions: Semaphore,
    rate: DefaultDirectRateLimiter,
}

impl Serving {
    fn is_member(&self, from: SocketAddr) -> bool {
        matches!(from.ip(), IpAddr::V4(address) if self.resolver.subnet.contains(address))
    }

    /// The answer to one question, if there is any.
    async fn answer(&self, bytes: &[u8], datagram: bool) -> Option<Vec<u8>> {
        // Asked too often: silence costs least, and is what a lost datagram looks like.
        self.rate.check().ok()?;
        let _turn = self.questions.acquire().await.ok()?;
        let Resolver { policy, upstream, .. } = &self.resolver;
        let question = match read_question(bytes, policy, &upstream.host().domains) {
            Asked::Nothing => return None,
            Asked::Answered(answer) => return Some(answer),
            Asked::PassedOn(question) => question,
        };
        match upstream.ask(&question).await {
            Some(told) if self.admitted(&question, &told).await => question.answer(&told, datagram),
            _ => question.failure(),
        }
    }

    /// What a guest is told of must be reachable by then.
    async fn admitted(&self, question: &Question, told: &Told) -> bool {
        let Resolver { network, policy, admissions, .. } = &self.resolver;
        let ports = policy.ports(&question.name);
        if ports.is_empty() || told.addresses.is_empty() {
            return true;
        }
        let addresses = told.addresses.iter().copied().collect();
        let (done, answer) = oneshot::channel();
        let request = AdmitRequest { network: *network, addresses, ports, seconds: told.seconds.into(), done };
        admissions.send(request).await.is_ok() && answer.await.unwrap_or(false)
    }

    async fn converse(&self, mut stream: TcpStream) -> std::io::Result<()> {
        loop {
            let length = usize::from(timeout(IDLE, stream.read_u16()).await??);
            if length > QUESTION_MAX {
                return Ok(());
            }
            let mut bytes = vec![0; length];
            timeout(IDLE, stream.read_exact(&mut bytes)).await??;
            let Some(answer) = self.answer(&bytes, false).await else { return Ok(()) };
            let length = u16::try_from(answer.len()).unwrap_or(u16::MAX);
            timeout(IDLE, stream.write_all(&[&length.to_be_bytes(), &answer[..]].concat())).await??;
        }
    }
}
