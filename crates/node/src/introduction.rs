//! Invitations: making one, answering one, and letting in who answers (DESIGN 2, SECURITY M7).
//!
//! A ticket carries the inviter's card and the seed of a one-time key. The gate admits that key alone, to the join protocol
//! alone, until it has been used or has expired. Using it and trusting the one who joins is a single transaction.

use std::collections::HashMap;
use std::time::Duration;

use peer_net::exchange::{Deadline, ExchangeError, read_frame, read_frame_bytes, write_frame, write_frame_bytes};
use peer_net::{ConnectionState, DialOnceError, InboundStream, Network, OpenError, Role, Stream, dial_once};
use peer_proto::PeerId;
use peer_proto::card::{CardError, SignedCard, Ticket};
use peer_proto::code::{Code, Problem, Threat};
use peer_proto::control::{Invitation, Invite, Join};
use peer_proto::frame::INTRODUCTION_FRAME_MAX;
use peer_proto::grant::Grants;
use peer_proto::identity::Identity;
use peer_proto::join::{self, JoinReply};
use peer_proto::unit::{Timestamp, in_words};
use peer_state::audit::{self, Entry, Outcome};
use peer_state::database::Database;
use peer_trust::key_file::MachineIdentity;
use peer_trust::peers::{InvitationRecord, PeerRecord};
use peer_trust::trust::{ChangeError, Repeated, Trust};
use tokio::sync::watch;
use zeroize::Zeroizing;

use crate::clock;
use crate::daemon::Daemon;
use crate::node::Node;
use crate::notices::Notices;
use crate::protocols;

/// Longest wait for a frame of the join protocol.
const FRAME_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time that the one who joins may take to reach the inviter.
const DIAL_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest wait for the gate to follow a change of the trust list.
const GATE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the gate is looked at while it follows.
const GATE_PAUSE: Duration = Duration::from_millis(5);

/// One-time keys that are being answered, each with the number of streams that are answered under it.
pub type Answered = HashMap<PeerId, usize>;

/// The inviting side's state: which one-time keys are being answered at this moment.
#[derive(Debug, Clone)]
pub struct Introductions {
    answered: watch::Sender<Answered>,
}

impl Default for Introductions {
    fn default() -> Self {
        Self { answered: watch::Sender::new(Answered::new()) }
    }
}

impl Introductions {
    /// Follows the one-time keys whose connections must last until their answer has arrived.
    pub fn watch(&self) -> watch::Receiver<Answered> {
        self.answered.subscribe()
    }

    fn answering(&self, ticket: PeerId) -> Answering<'_> {
        self.answered.send_modify(|answered| *answered.entry(ticket).or_default() += 1);
        Answering { introductions: self, ticket }
    }
}

struct Answering<'a> {
    introductions: &'a Introductions,
    ticket: PeerId,
}

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.introductions.answered.send_modify(|answered| {
            // Somebody else who holds the same ticket may still be waiting for his answer.
            if let Some(streams) = answered.get_mut(&self.ticket) {
                *streams -= 1;
                if *streams == 0 {
                    answered.remove(&self.ticket);
                }
            }
        });
    }
}

/// What introductions need of the node.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    /// This machine.
    pub identity: &'a MachineIdentity,
    /// Its gate.
    pub network: &'a Network,
    /// Whom it trusts.
    pub trust: &'a Trust,
    /// Where refusals are audited.
    pub database: &'a Database,
    /// Whom to tell.
    pub notices: &'a Notices,
}

impl<'a> Parts<'a> {
    /// Those of a running node.
    pub fn of(daemon: &'a Daemon, node: &'a Node) -> Self {
        Self {
            identity: &node.identity,
            network: &node.network,
            trust: &daemon.trust,
            database: &daemon.database,
            notices: &daemon.notices,
        }
    }
}

/// Opens an invitation. The ticket is in the answer and nowhere else.
pub async fn invite(parts: Parts<'_>, card: SignedCard, request: Invite) -> Result<Invitation, Problem> {
    if card.card().addresses().next().is_none() {
        let message = "this machine has no address at which it could be reached; set `listen` or `announce` in the \
                       configuration of peerd and start it again";
        return Err(Problem::new(Code::InvalidArgument, message));
    }
    let now = clock::now();
    let mut seed = Zeroizing::new([0; 32]);
    getrandom::fill(&mut seed[..])
        .map_err(|error| Problem::new(Code::Internal, format!("the system gives no random bytes: {error}")))?;
    let ticket = Identity::from_seed(&seed).peer_id();
    let expires_at = now.plus(request.expires_seconds.saturating_mul(1000));
    let record = InvitationRecord { ticket, grants: request.grants.clone(), name: request.name, expires_at };
    parts.trust.invite(record, now).await.map_err(change_problem)?;
    until(parts.network, ticket, true).await;
    let text = Ticket { inviter: card, seed, expires_at }.to_text();
    Ok(Invitation { id: ticket.to_string(), ticket: Some(String::clone(&text)), expires_at, grants: request.grants })
}

/// Serves one stream of the join protocol.
pub async fn serve(daemon: &Daemon, node: &Node, inbound: InboundStream) -> Result<(), ExchangeError> {
    answer(Parts::of(daemon, node), &node.introductions, inbound).await
}

async fn answer(parts: Parts<'_>, introductions: &Introductions, inbound: InboundStream) -> Result<(), ExchangeError> {
    let InboundStream { peer: ticket, role, address, mut stream, .. } = inbound;
    if role != Role::Joiner {
        return Ok(());
    }
    // Until the answer has arrived: the invitation itself is gone by then.
    let _answering = introductions.answering(ticket);
    let reply = match admit(parts, ticket, address.to_string(), &mut stream).await? {
        Ok(record) => {
            tracing::info!(peer = %record.peer, name = %record.name, "invitation used");
            let message = format!("'{}' has joined from {address}", record.name);
            parts.notices.push("peer_added", Some(record.peer.to_string()), None, message);
            until(parts.network, record.peer, true).await;
            JoinReply::Welcome(record.grants)
        }
        Err(problem) => {
            let message = format!("an answer to an invitation from {address} was refused: {}", problem.message);
            parts.notices.push("peer_refused", None, None, message);
            JoinReply::Refused(problem)
        }
    };
    let deadline = Deadline::after(FRAME_TIMEOUT);
    write_frame(&mut stream, &reply, INTRODUCTION_FRAME_MAX, deadline).await?;
    // The other side closes when it has read the answer; nothing more is expected of it.
    match read_frame_bytes(&mut stream, 0, deadline).await {
        Ok(_) | Err(ExchangeError::Ended | ExchangeError::Broken(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Takes the answer and trusts its sender, or says why not.
async fn admit(
    parts: Parts<'_>,
    ticket: PeerId,
    address: String,
    stream: &mut Stream,
) -> Result<Result<PeerRecord, Problem>, ExchangeError> {
    let bytes = read_frame_bytes(stream, INTRODUCTION_FRAME_MAX, Deadline::after(FRAME_TIMEOUT)).await?;
    match open(&bytes, &ticket, &parts.identity.key.peer_id()) {
        Ok(card) => Ok(parts.trust.redeem(ticket, card, address, clock::now()).await.map_err(change_problem)),
        Err(problem) => {
            audit_refusal(parts.database, ticket, &problem).await;
            Ok(Err(problem))
        }
    }
}

fn open(bytes: &[u8], ticket: &PeerId, me: &PeerId) -> Result<SignedCard, Problem> {
    let card = join::open(bytes, ticket, me).map_err(|error| {
        Problem::new(Code::Malformed, format!("the answer to the invitation is not valid: {error}"))
    })?;
    if card.card().peer == *me {
        return Err(Problem::new(Code::InvalidTicket, "a machine cannot answer its own invitation"));
    }
    Ok(card)
}

async fn audit_refusal(database: &Database, ticket: PeerId, problem: &Problem) {
    let (actor, outcome) = (ticket.to_string(), Outcome::Refused(Threat::V2));
    let entry = Entry { at: clock::now(), actor, action: "join".into(), outcome, detail: problem.message.clone() };
    if let Err(error) = database.write(move |tx| audit::append(tx, &entry)).await {
        tracing::error!(%error, "a refusal could not be audited");
    }
}

/// Answers a ticket: makes the two machines trust each other, or renews it where one of them still does. Gives the inviter's
/// record and what it allows us.
pub async fn join(parts: Parts<'_>, card: SignedCard, request: Join) -> Result<(PeerRecord, Grants), Problem> {
    let ticket: Ticket = Zeroizing::new(request.ticket).parse().map_err(|error| ticket_problem(&error))?;
    check(parts, &ticket, request.name.as_ref())?;
    let granted = present(parts, &card, &ticket).await?;
    let inviter = ticket.inviter.card().peer;
    let added =
        parts.trust.add(ticket.inviter.clone(), request.name, request.grants, Repeated::Renewed, clock::now()).await;
    let record = added.map_err(|error| {
        let problem = change_problem(error);
        let message = format!(
            "{inviter} has added this machine, but could not be added here: {}. Add it with: peerctl peers add {}",
            problem.message, ticket.inviter
        );
        Problem::new(problem.code, message)
    })?;
    parts.notices.push("peer_added", Some(inviter.to_string()), None, format!("joined '{}'", record.name));
    until(parts.network, inviter, true).await;
    Ok((record, granted))
}

/// Everything that can be known to fail before the ticket is used up.
fn check(parts: Parts<'_>, ticket: &Ticket, name: Option<&peer_proto::id::Name>) -> Result<(), Problem> {
    let inviter = ticket.inviter.card();
    if inviter.peer == parts.identity.key.peer_id() {
        let message = "this is an invitation of this machine; run `peerctl join` on the other one";
        return Err(Problem::new(Code::InvalidTicket, message));
    }
    let list = parts.trust.snapshot();
    if let Some(name) = name
        && list.peers.values().any(|peer| peer.name == *name && peer.peer != inviter.peer)
    {
        let message = format!("another peer is called '{name}'; choose another name with --name");
        return Err(Problem::new(Code::NameTaken, message));
    }
    expired(ticket, clock::now())
}

fn expired(ticket: &Ticket, now: Timestamp) -> Result<(), Problem> {
    if now < ticket.expires_at {
        return Ok(());
    }
    let message = format!(
        "the invitation expired {} ago by this machine's clock; ask for a new one, or, if it is fresh, set this machine's \
         clock, which is wrong then",
        in_words(now.since(ticket.expires_at))
    );
    Err(Problem::new(Code::InvalidTicket, message))
}

/// Presents our card under the one-time key and takes the inviter's answer.
async fn present(parts: Parts<'_>, card: &SignedCard, ticket: &Ticket) -> Result<Grants, Problem> {
    let inviter = ticket.inviter.card();
    let one_time = Identity::from_seed(&ticket.seed);
    let addresses: Vec<_> = inviter.addresses().cloned().collect();
    let dialled = dial_once(one_time.to_keypair(), inviter.peer, &addresses, protocols::JOIN, DIAL_TIMEOUT).await;
    let (mut stream, connection) = dialled.map_err(|error| dial_problem(&error))?;
    let answer = join::seal(&parts.identity.key, card, one_time.peer_id(), inviter.peer);
    let deadline = Deadline::after(FRAME_TIMEOUT);
    let exchange = async {
        write_frame_bytes(&mut stream, &answer, INTRODUCTION_FRAME_MAX, deadline).await?;
        read_frame::<JoinReply, _>(&mut stream, INTRODUCTION_FRAME_MAX, deadline).await
    };
    let reply = exchange.await;
    drop(stream);
    connection.close().await;
    match reply {
        Ok(JoinReply::Welcome(granted)) => Ok(granted),
        Ok(JoinReply::Refused(problem)) => {
            let message = format!("the inviter refused: {}", peer_proto::text::escape(&problem.message));
            Err(Problem::new(problem.code, message))
        }
        Err(error) => {
            let message = format!(
                "the inviter did not answer ({error}); ask whether it has added this machine, and \
                                   if not, try again"
            );
            Err(Problem::new(Code::PeerOffline, message))
        }
    }
}

/// Waits until the gate admits the peer, or does not any more.
pub async fn until(network: &Network, peer: PeerId, admitted: bool) {
    let follows = async {
        while matches!(network.connection_state(peer), ConnectionState::NotAdmitted) == admitted {
            tokio::time::sleep(GATE_PAUSE).await;
        }
    };
    if tokio::time::timeout(GATE_TIMEOUT, follows).await.is_err() {
        tracing::warn!(%peer, "the gate did not follow the trust list in time");
    }
}

/// A failed change of the trust list, as it is told.
pub fn change_problem(error: ChangeError) -> Problem {
    match error {
        ChangeError::Refused(problem) => problem,
        ChangeError::List(error) => Problem::new(Code::Internal, error.to_string()),
    }
}

fn ticket_problem(error: &CardError) -> Problem {
    let code = if matches!(error, CardError::NotOfThisKind(..)) { Code::InvalidArgument } else { Code::InvalidTicket };
    Problem::new(code, format!("the ticket is not valid: {error}"))
}

fn dial_problem(error: &DialOnceError) -> Problem {
    match error {
        DialOnceError::Open(OpenError::RefusedByPeer { .. } | OpenError::NotOffered { .. }) => {
            let message = "the inviter does not accept this invitation: it has been used, withdrawn, or has expired; \
                           ask for a new one";
            Problem::new(Code::InvalidTicket, message)
        }
        DialOnceError::Open(error @ OpenError::WrongPeer { .. }) => Problem::new(Code::WrongSigner, error.to_string()),
        DialOnceError::Open(error) => {
            Problem::new(Code::PeerOffline, format!("the inviter cannot be reached: {error}"))
        }
        DialOnceError::Start(error) => Problem::new(Code::Internal, error.to_string()),
    }
}

#[cfg(test)]
#[path = "introduction_tests.rs"]
mod tests;
