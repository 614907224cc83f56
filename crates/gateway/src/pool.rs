//! Streams to deployments: opened on demand, kept for a moment for the next request of the same visitor to the same
//! deployment, never for another (SECURITY M14). A stream ends with its lease.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use peer_net::exchange::{Deadline, read_frame, write_frame};
use peer_net::{Network, OpenError, PeerId, Protocol, Traffic};
use peer_proto::code::Code;
use peer_proto::frame::TUNNEL_FRAME_MAX;
use peer_proto::query::StreamReply;
use peer_proto::tunnel::VisitHeader;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::body::RequestBody;
use crate::leases::Lease;
use crate::pages::Page;
use crate::strict::{FIELDS_MAX, HEAD_BYTES_MAX};

/// The protocol that visits travel on.
pub const TUNNEL: Protocol = Protocol::new("/peer-compute/tunnel/1");

/// Streams that wait for another request, over all providers.
const IDLE_MAX: usize = 1024;
/// Streams of one provider that wait for another request.
const IDLE_PER_PROVIDER_MAX: usize = 64;
/// How long a stream waits for another request.
const IDLE_TIME: Duration = Duration::from_secs(15);
/// Longest wait for a kept stream to be ready again; its last answer is over, so this is a matter of scheduling.
const READY_TIME: Duration = Duration::from_millis(20);
/// Longest wait for a provider to accept a visit, after the stream is open.
const ACCEPT_TIME: Duration = Duration::from_secs(10);

/// What a stream may be used for again: one registration of one deployment, and one visitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    generation: u64,
    visitor: IpAddr,
}

#[derive(Debug)]
struct Kept {
    key: Key,
    provider: PeerId,
    sender: SendRequest<RequestBody>,
    ended: CancellationToken,
    since: Instant,
}

/// The kept streams, oldest first.
#[derive(Debug)]
struct Idle(Mutex<VecDeque<Kept>>);

impl Idle {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, key: Key) -> Option<SendRequest<RequestBody>> {
        let mut kept = self.lock();
        let position = kept.iter().rposition(|kept| kept.key == key)?;
        kept.remove(position).map(|kept| kept.sender)
    }

    fn keep(&self, new: Kept) {
        let mut kept = self.lock();
        if kept.iter().filter(|kept| kept.provider == new.provider).count() >= IDLE_PER_PROVIDER_MAX
            && let Some(oldest) = kept.iter().position(|kept| kept.provider == new.provider)
        {
            kept.remove(oldest);
        }
        if kept.len() >= IDLE_MAX {
            kept.pop_front();
        }
        kept.push_back(new);
    }
}

/// A stream in use, which may be kept once its answer is complete.
#[derive(Debug)]
pub struct Reusable {
    kept: Kept,
    idle: Arc<Idle>,
}

impl Reusable {
    /// Sends a request; see [`SendRequest::try_send_request`].
    pub fn sender(&mut self) -> &mut SendRequest<RequestBody> {
        &mut self.kept.sender
    }

    /// Keeps the stream for another request.
    pub fn keep(mut self) {
        if !self.kept.ended.is_cancelled() && !self.kept.sender.is_closed() {
            self.kept.since = Instant::now();
            self.idle.keep(self.kept);
        }
    }
}

/// Opens and keeps streams.
#[derive(Debug)]
pub struct Pool {
    network: Network,
    idle: Arc<Idle>,
    tasks: TaskTracker,
    /// Streams opened since the start.
    opened: std::sync::atomic::AtomicU64,
}

impl Pool {
    /// Nothing open yet. `tasks` owns the streams' work.
    pub fn new(network: Network, tasks: TaskTracker) -> Self {
        Self { network, idle: Arc::new(Idle(Mutex::default())), tasks, opened: 0.into() }
    }

    /// A kept stream, if there is one that still answers.
    pub async fn kept(&self, lease: &Lease, visitor: IpAddr) -> Option<Reusable> {
        let key = Key { generation: lease.generation, visitor };
        while let Some(mut sender) = self.idle.take(key) {
            if let Ok(Ok(())) = tokio::time::timeout(READY_TIME, sender.ready()).await {
                return Some(self.reusable(lease, key, sender));
            }
        }
        None
    }

    /// A fresh stream to the deployment.
    pub async fn open(&self, lease: &Lease, visitor: IpAddr) -> Result<Reusable, Page> {
        let mut stream =
            self.network.open(lease.provider, TUNNEL, Traffic::Bulk).await.map_err(|error| open_page(lease, &error))?;
        self.opened.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let header = VisitHeader { deployment: lease.deployment, visitor };
        let deadline = Deadline::after(ACCEPT_TIME);
        let broken = |error| {
            tracing::info!(provider = %lease.provider, deployment = %lease.deployment, %error, "visit not accepted");
            Page::ProviderRefused
        };
        write_frame(&mut stream, &header, TUNNEL_FRAME_MAX, deadline).await.map_err(broken)?;
        match read_frame::<StreamReply, _>(&mut stream, TUNNEL_FRAME_MAX, deadline).await.map_err(broken)? {
            StreamReply::Open => {}
            StreamReply::Refused(problem) => {
                let message = peer_proto::text::escape(&problem.message);
                tracing::info!(provider = %lease.provider, deployment = %lease.deployment, code = %problem.code, message, "visit refused");
                return Err(refusal_page(problem.code));
            }
        }
        let (sender, connection) = http1::Builder::new()
            .max_headers(2 * FIELDS_MAX)
            .max_buf_size(2 * HEAD_BYTES_MAX)
            .handshake(TokioIo::new(stream.into_tokio()))
            .await
            .map_err(|_| Page::DeploymentFailed)?;
        let ended = lease.ended.clone();
        self.tasks.spawn(async move {
            // Failures show in the answer that waits for this stream.
            drop(ended.run_until_cancelled_owned(connection.with_upgrades()).await);
        });
        Ok(self.reusable(lease, Key { generation: lease.generation, visitor }, sender))
    }

    /// Lets go of streams that have waited long enough or whose lease has ended.
    pub fn sweep(&self) {
        self.idle
            .lock()
            .retain(|kept| kept.since.elapsed() < IDLE_TIME && !kept.ended.is_cancelled() && !kept.sender.is_closed());
    }

    /// Lets go of all kept streams.
    pub fn clear(&self) {
        self.idle.lock().clear();
    }

    /// Streams kept now.
    pub fn idle(&self) -> usize {
        self.idle.lock().len()
    }

    /// Streams opened since the start.
    pub fn opened(&self) -> u64 {
        self.opened.load(std::sync::atomic::Ordering::Relaxed)
    }

    fn reusable(&self, lease: &Lease, key: Key, sender: SendRequest<RequestBody>) -> Reusable {
        let kept = Kept { key, provider: lease.provider, sender, ended: lease.ended.clone(), since: Instant::now() };
        Reusable { kept, idle: Arc::clone(&self.idle) }
    }
}

fn open_page(lease: &Lease, error: &OpenError) -> Page {
    tracing::info!(provider = %lease.provider, %error, "no stream to the provider");
    match error {
        OpenError::Busy { .. } => Page::ProviderBusy,
        OpenError::NotOffered { .. } | OpenError::RefusedByPeer { .. } => Page::ProviderRefused,
        OpenError::Stopped => Page::ShuttingDown,
        _ => Page::ProviderOffline,
    }
}

fn refusal_page(code: Code) -> Page {
    match code {
        Code::NoSuchDeployment | Code::WrongState | Code::ContainerExited => Page::Stopped,
        Code::Paused => Page::Paused,
        Code::PortClosed => Page::DeploymentFailed,
        Code::Timeout => Page::DeploymentTimedOut,
        Code::TooManyRequests | Code::NoCapacity | Code::ShuttingDown => Page::ProviderBusy,
        _ => Page::ProviderRefused,
    }
}
