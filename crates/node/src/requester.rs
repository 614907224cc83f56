//! Our deployments on other machines: asks their providers, and remembers what they said.
//!
//! The id of a deployment is known before its request is sent, and is written down first, so that an answer that is lost
//! does not lose the deployment.

mod clocks;
mod conversation;
mod memory;
mod telling;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use peer_compute::room::database_problem;
use peer_net::exchange::{Deadline, ExchangeError, read_frame, write_frame};
use peer_net::{Network, OpenError, Protocol, Stream, Traffic};
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use peer_proto::deploy::{LayerHeader, Request, Status};
use peer_proto::frame::CONTROL_FRAME_MAX;
use peer_proto::id::{DeploymentId, Digest, RequestHash, RequestId};
use peer_proto::query::{Answer, Call, Hello, Query};
use peer_proto::unit::Timestamp;
use peer_state::database::Database;
use peer_trust::trust::Trust;
use tokio::sync::watch;

use crate::protocols;
use clocks::PeerClocks;

pub use conversation::Conversation;
pub use memory::{Remembered, SCHEMA, change_provider};
pub use telling::Told;

/// How long one frame of a provider's answer to a read may take.
const READ_DEADLINE: Duration = Duration::from_secs(15);
/// Most uploads that may be waited for at one time.
const UPLOADS_MAX: usize = 256;

/// Asks providers in the name of this machine; clones share it.
#[derive(Debug, Clone)]
pub struct Requester {
    pub(crate) network: Network,
    pub(crate) identity: peer_proto::identity::Identity,
    pub(crate) database: Database,
    trust: Trust,
    uploads: Arc<Mutex<HashMap<RequestHash, Upload>>>,
    clocks: PeerClocks,
    closed: watch::Receiver<bool>,
}

/// Layers that a provider waits for.
#[derive(Debug, Clone)]
struct Upload {
    provider: PeerId,
    sizes: HashMap<Digest, u64>,
}

impl Requester {
    /// Speaks over `network` with the key `identity`, and to nobody while `closed` says so.
    pub fn new(
        network: Network,
        identity: peer_proto::identity::Identity,
        database: Database,
        trust: Trust,
        closed: watch::Receiver<bool>,
    ) -> Self {
        Self { network, identity, database, trust, uploads: Arc::default(), clocks: PeerClocks::default(), closed }
    }

    /// Refuses to speak to anybody from a machine that was closed in an emergency.
    pub fn check_open(&self) -> Result<(), Problem> {
        if *self.closed.borrow() {
            let message = "this machine was closed by `peerctl panic`; `peerctl resume` opens it again";
            return Err(Problem::new(Code::Paused, message));
        }
        Ok(())
    }

    /// The name that a peer has here, or its PeerId.
    pub fn name_of(&self, peer: &PeerId) -> String {
        self.trust.snapshot().peers.get(peer).map_or_else(|| peer.to_string(), |record| record.name.to_string())
    }

    /// Opens a stream to a peer; a failure is told with the peer's name.
    pub async fn open(&self, peer: PeerId, protocol: Protocol, traffic: Traffic) -> Result<Stream, Problem> {
        self.check_open()?;
        let opened = self.network.open(peer, protocol, traffic).await;
        opened.map_err(|error| open_problem(&self.name_of(&peer), &error))
    }

    /// Opens a control stream and reads the provider's greeting.
    async fn greet(&self, peer: PeerId) -> Result<(Stream, Hello), Problem> {
        let mut stream = self.open(peer, protocols::CONTROL, Traffic::Control).await?;
        let hello = read_frame(&mut stream, CONTROL_FRAME_MAX, Deadline::after(READ_DEADLINE)).await;
        let hello: Hello = hello.map_err(|error| exchange_problem(&self.name_of(&peer), &error))?;
        self.clocks.note(peer, hello.clock, crate::clock::now());
        Ok((stream, hello))
    }

    /// Trusted peers whose clocks were seen within the last hour, by name, and by how much they stood ahead of ours
    /// (milliseconds).
    pub fn clocks_of_peers(&self) -> Vec<(String, i64)> {
        let list = self.trust.snapshot();
        let name = |peer: &PeerId| Some(list.peers.get(peer)?.name.to_string());
        self.clocks.lately().iter().filter_map(|(peer, ahead)| Some((name(peer)?, *ahead))).collect()
    }

    /// Asks for something that changes nothing.
    pub async fn query(&self, peer: PeerId, query: Query) -> Result<Answer, Problem> {
        let (mut stream, _) = self.greet(peer).await?;
        let lost = |error: ExchangeError| exchange_problem(&self.name_of(&peer), &error);
        let deadline = Deadline::after(READ_DEADLINE);
        write_frame(&mut stream, &Call::Query(query), CONTROL_FRAME_MAX, deadline).await.map_err(lost)?;
        match read_frame(&mut stream, CONTROL_FRAME_MAX, deadline).await.map_err(lost)? {
            Answer::Problem(problem) => Err(self.in_name_of(&peer, &problem)),
            answer => Ok(answer),
        }
    }

    /// Refuses a clock that went back: what it dates would be refused elsewhere, or be valid for longer than it should.
    pub(crate) async fn check_clock(&self, now: Timestamp) -> Result<(), Problem> {
        let passed = self.database.write(move |tx| peer_trust::floor::pass(tx, now)).await;
        passed.map_err(|error| database_problem(&error))?
    }

    /// Signs a request, sends it, and gives its answer to follow.
    pub async fn request(&self, peer: PeerId, request: Request) -> Result<Conversation, Problem> {
        let (mut stream, hello) = self.greet(peer).await?;
        let request_id = RequestId::random();
        let now = crate::clock::now();
        self.check_clock(now).await?;
        if let Request::Deploy(deploy) = &request {
            let id = DeploymentId::derive(&self.identity.peer_id(), &request_id);
            memory::intend(&self.database, peer, id, deploy.specification.clone(), now).await?;
        }
        let outgoing = peer_proto::envelope::seal(&self.identity, peer, hello.incarnation, request_id, now, request);
        let call = Call::Signed(outgoing.bytes);
        let sent = write_frame(&mut stream, &call, CONTROL_FRAME_MAX, Deadline::after(READ_DEADLINE)).await;
        sent.map_err(|error| exchange_problem(&self.name_of(&peer), &error))?;
        Ok(Conversation::new(self.clone(), peer, stream, outgoing.hash, request_id))
    }

    /// All our deployments on a peer, asked now and remembered.
    pub async fn list(&self, peer: PeerId) -> Result<Vec<Status>, Problem> {
        let Answer::List(statuses) = self.query(peer, Query::List).await? else {
            return Err(self.unexpected(&peer));
        };
        memory::replace(&self.database, peer, statuses.clone(), crate::clock::now()).await?;
        Ok(statuses)
    }

    /// One of our deployments, asked now and remembered.
    pub async fn inspect(&self, peer: PeerId, id: DeploymentId) -> Result<Status, Problem> {
        match self.query(peer, Query::Inspect(id)).await {
            Ok(Answer::Inspect(status)) if status.id == id => {
                memory::remember(&self.database, peer, (*status).clone(), crate::clock::now()).await?;
                Ok(*status)
            }
            Ok(_) => Err(self.unexpected(&peer)),
            Err(problem) => {
                if problem.code == Code::NoSuchDeployment {
                    memory::forget(&self.database, id).await?;
                }
                Err(problem)
            }
        }
    }

    /// Everything that we remember of our deployments.
    pub async fn remembered(&self) -> Result<Vec<Remembered>, Problem> {
        memory::all(&self.database).await
    }

    fn unexpected(&self, peer: &PeerId) -> Problem {
        Problem::new(Code::Malformed, format!("{} answered something else than was asked", self.name_of(peer)))
    }

    /// A provider's words, made safe to show, with its name in front.
    pub(crate) fn in_name_of(&self, peer: &PeerId, problem: &Problem) -> Problem {
        let message: String = peer_proto::text::escape(&problem.message).chars().take(2048).collect();
        Problem::new(problem.code, format!("{}: {message}", self.name_of(peer)))
    }

    fn uploads(&self) -> std::sync::MutexGuard<'_, HashMap<RequestHash, Upload>> {
        self.uploads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets layers of the request be sent, until [`Requester::end_upload`].
    pub fn begin_upload(
        &self,
        request: RequestHash,
        provider: PeerId,
        sizes: HashMap<Digest, u64>,
    ) -> Result<(), Problem> {
        let mut uploads = self.uploads();
        if uploads.len() >= UPLOADS_MAX {
            return Err(Problem::new(Code::NoCapacity, "too many images are being sent; try again later"));
        }
        uploads.insert(request, Upload { provider, sizes });
        Ok(())
    }

    /// Ends what [`Requester::begin_upload`] began.
    pub fn end_upload(&self, request: RequestHash) {
        self.uploads().remove(&request);
    }

    /// Opens the way for one layer: the provider's stream, and the layer's size.
    pub async fn open_layer(&self, request: RequestHash, layer: Digest) -> Result<(PeerId, Stream, u64), Problem> {
        let upload = self.uploads().get(&request).cloned();
        let unwanted = || Problem::new(Code::InvalidArgument, "no request waits for this layer");
        let upload = upload.ok_or_else(unwanted)?;
        let size = *upload.sizes.get(&layer).ok_or_else(unwanted)?;
        let mut stream = self.open(upload.provider, protocols::LAYERS, Traffic::Bulk).await?;
        let header = LayerHeader { request, layer };
        let written = write_frame(&mut stream, &header, CONTROL_FRAME_MAX, Deadline::after(READ_DEADLINE)).await;
        written.map_err(|error| exchange_problem(&self.name_of(&upload.provider), &error))?;
        Ok((upload.provider, stream, size))
    }
}

/// Why a peer could not be reached, in its name.
pub fn open_problem(name: &str, error: &OpenError) -> Problem {
    let (code, message) = match error {
        OpenError::NotAdmitted { .. } => (Code::UnknownPeer, format!("{name} is not in the trust list; add it first")),
        OpenError::RefusedByPeer { .. } => (
            Code::RefusedByPeer,
            format!("{name} refused the connection: it has not added this machine as a peer, or has removed it"),
        ),
        OpenError::TimedOut { .. } => {
            (Code::Timeout, format!("{name} did not answer in time; see whether its daemon runs and is not overloaded"))
        }
        OpenError::Busy { .. } => (Code::NoCapacity, format!("too much is open to {name} at present; try again later")),
        OpenError::NotOffered { .. } => {
            (Code::UnsupportedVersion, format!("{name} does not offer this; its daemon may be older than this one"))
        }
        OpenError::WrongPeer { .. } => {
            (Code::PeerOffline, format!("another machine answers at the address of {name}: {error}"))
        }
        OpenError::Offline { .. } | OpenError::Broken { .. } | OpenError::Stopped => {
            (Code::PeerOffline, format!("{name} cannot be reached ({error}); see whether it is on and its daemon runs"))
        }
    };
    Problem::new(code, message)
}

/// Why a conversation with a peer broke off.
pub fn exchange_problem(name: &str, error: &ExchangeError) -> Problem {
    match error {
        ExchangeError::Ended | ExchangeError::Broken(_) => {
            Problem::new(Code::PeerOffline, format!("the connection to {name} was lost ({error}); try again"))
        }
        ExchangeError::TimedOut => Problem::new(Code::Timeout, format!("{name} did not answer in time; try again")),
        ExchangeError::Frame(error) => {
            Problem::new(Code::Malformed, format!("{name} answered with something unreadable: {error}"))
        }
    }
}
