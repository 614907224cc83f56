//! Statements about keys on their way: taken from peers and from this machine's user, carried out, and passed on.
//!
//! Anybody may carry a statement, since it proves itself. Only those are kept and passed on that ended a key which this
//! machine knew: what a stranger invents costs nobody anything.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream;
use peer_compute::room::end_all_of;
use peer_compute::succession::{self, Succession};
use peer_net::{ConnectionState, NetworkEvent, Role};
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem, Threat};
use peer_proto::query::Offered;
use peer_proto::statement::{OFFERS_MAX, Statement};
use peer_state::audit::{self, Entry, Outcome};
use peer_state::database::{DatabaseError, Tx};
use peer_trust::follow::{Bearer, Followed};
use peer_trust::key_file::FormerKey;
use peer_trust::pending;
use peer_trust::refused_keys::{self, RefusedKey};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use crate::clock;
use crate::daemon::{Daemon, names_of};
use crate::introduction::{change_problem, until};
use crate::node::Node;
use crate::requester::{Told, change_provider};

/// How often peers are told who could not be told before.
const PAUSE: Duration = Duration::from_secs(20);
/// Peers that are told at one time.
const TOLD_AT_ONCE: usize = 8;
/// Rounds of offers to one peer: each may make it know a key that the next is about.
const ROUNDS_MAX: usize = 8;
/// Most statements that one peer is told of in one run of the daemon.
const OFFERED_MAX: usize = 1024;

/// Carries a statement out. What it changes here is one transaction; what it changes in the running program follows at once.
pub async fn take(
    daemon: &Arc<Daemon>,
    node: &Arc<Node>,
    statement: Statement,
    bearer: Bearer,
) -> Result<Followed, Problem> {
    let own = &node.identity;
    let me = own.key.peer_id();
    let successor = statement.successor().map(|card| card.card().peer);
    if successor.is_some_and(|key| key == me || own.history.contains(&key)) {
        return Ok(Followed::Already);
    }
    if statement.subjects().iter().any(|key| *key == me || own.history.contains(key)) {
        return about_ourselves(daemon, node, &statement, bearer).await;
    }
    if daemon.gateways.list().iter().any(|gateway| Some(gateway.peer) == successor) {
        let message = "the new key that the statement names is that of a gateway in the list";
        return Err(Problem::new(Code::InvalidArgument, message));
    }
    let followed = daemon.trust.follow(statement, bearer, clock::now(), hand_over).await;
    let (followed, succession) = followed.map_err(change_problem)?;
    act(daemon, node, &followed, &succession).await;
    Ok(followed)
}

/// What a statement changes in the other rooms, in its transaction; the text is for the audit log.
fn hand_over(tx: &Tx<'_>, followed: &Followed) -> Result<(Succession, String), DatabaseError> {
    match followed {
        Followed::Already | Followed::Refused { .. } => Ok((Succession::default(), String::new())),
        Followed::Moved { former, record } => {
            let succession = succession::succeed(tx, &former.peer, &record.peer)?;
            change_provider(tx, &former.peer, &record.peer)?;
            let Succession { passed, ended } = &succession;
            let mut text = format!("its deployments here go on: {}", names_of(passed));
            if !ended.is_empty() {
                text.push_str("; ended, since the new key has given their names already: ");
                text.push_str(&names_of(ended));
            }
            Ok((succession, text))
        }
        Followed::Ended { former } => {
            let ended = end_all_of(tx, &former.peer)?;
            let text = format!("its deployments here are ended: {}", names_of(&ended));
            Ok((Succession { passed: Vec::new(), ended }, text))
        }
    }
}

async fn act(daemon: &Daemon, node: &Node, followed: &Followed, succession: &Succession) {
    let (former, record) = match followed {
        Followed::Already => return,
        Followed::Refused { .. } => {
            daemon.statements.notify_one();
            return;
        }
        Followed::Moved { former, record } => (former, Some(record)),
        Followed::Ended { former } => (former, None),
    };
    if let Some(room) = &node.room {
        room.succeeded(succession);
    }
    until(&node.network, former.peer, false).await;
    let message = match record {
        Some(record) => {
            until(&node.network, record.peer, true).await;
            format!("'{}' has a new key: {} instead of {}", record.name, record.peer, former.peer)
        }
        None => format!("'{}' was removed: the recovery key of its machine has ended {}", former.name, former.peer),
    };
    tracing::info!("{message}");
    let kind = if record.is_some() { "peer_rotated" } else { "peer_removed" };
    daemon.notices.push(kind, Some(former.peer.to_string()), None, message);
    daemon.statements.notify_one();
}

/// Somebody who has our recovery phrase has ended our key: this machine counts as lost.
async fn about_ourselves(
    daemon: &Daemon,
    node: &Node,
    statement: &Statement,
    bearer: Bearer,
) -> Result<Followed, Problem> {
    if statement.recovery_key() != Some(node.identity.recovery_key) {
        let message = "the statement is about this machine's own key, and not by its recovery key";
        return Err(Problem::new(Code::WrongSigner, message));
    }
    if bearer == Bearer::PhraseHolder {
        let message =
            "this is the key of this machine itself; replace it here with: peerctl identity rotate --compromised";
        return Err(Problem::new(Code::InvalidArgument, message));
    }
    let message = "the recovery key of this machine has ended its key: friends refuse it from now on. If that was not you, \
                   your recovery phrase is known to others";
    tracing::error!("{message}");
    daemon.notices.push("identity_revoked", None, None, message.to_owned());
    let (actor, outcome) = (actor_of(bearer), Outcome::Refused(Threat::G3));
    let entry = Entry { at: clock::now(), actor, action: "identity ended".into(), outcome, detail: message.to_owned() };
    let written = daemon.database.write(move |tx| audit::append(tx, &entry)).await;
    written.map_err(|error| peer_compute::room::database_problem(&error))?;
    Ok(Followed::Already)
}

fn actor_of(bearer: Bearer) -> String {
    match bearer {
        Bearer::Local | Bearer::PhraseHolder => "local".to_owned(),
        Bearer::Peer(peer) => peer.to_string(),
    }
}

/// Which of the keys that a peer offers statements about are any business of ours.
pub async fn wanted(daemon: &Daemon, node: &Node, offers: &[Offered]) -> Result<Vec<u32>, Problem> {
    if offers.len() > OFFERS_MAX {
        return Err(Problem::new(Code::OverLimit, format!("at most {OFFERS_MAX} statements are offered at a time")));
    }
    let refused = known(daemon).await?;
    let incarnation = daemon.run.incarnation();
    let name = |peer: &PeerId| Offered::hash(peer, &incarnation);
    let peers: HashSet<_> = daemon.trust.snapshot().peers.keys().map(&name).collect();
    // The word of the recovery key goes before that of an ended key, and may be about ourselves.
    let ended = refused.iter().filter(|key| !key.by_recovery).map(|key| name(&key.peer));
    let stronger: HashSet<_> = ended.chain([name(&node.identity.key.peer_id())]).collect();
    let is_wanted =
        |offer: &Offered| peers.contains(&offer.subject) || (offer.by_recovery && stronger.contains(&offer.subject));
    let positions = offers.iter().zip(0..).filter(|(offer, _)| is_wanted(offer));
    Ok(positions.map(|(_, position)| position).collect())
}

async fn known(daemon: &Daemon) -> Result<Vec<RefusedKey>, Problem> {
    let known = daemon.database.write(refused_keys::all).await;
    let mut known = known.map_err(|error| peer_compute::room::database_problem(&error))?;
    known.sort_by_key(|key| std::cmp::Reverse(key.at));
    Ok(known)
}

/// Passes statements on, and tells peers of our own new key until all have confirmed it.
pub async fn spread(daemon: Arc<Daemon>, node: Arc<Node>, mut events: broadcast::Receiver<NetworkEvent>) {
    let mut told: HashMap<PeerId, HashSet<[u8; 32]>> = HashMap::new();
    let mut pause = tokio::time::interval(PAUSE);
    loop {
        tokio::select! {
            event = events.recv() => match event {
                Ok(NetworkEvent::Connected { .. }) | Err(RecvError::Lagged(_)) => {}
                Ok(_) => continue,
                Err(RecvError::Closed) => return,
            },
            () = daemon.statements.notified() => {}
            _ = pause.tick() => {}
        }
        if let Err(problem) = pass_on(&daemon, &node, &mut told).await {
            tracing::warn!(%problem, "statements could not be passed on");
        }
        deliver(&daemon, &node).await;
    }
}

/// Offers what is held to every connected peer that has not been offered it in this run.
async fn pass_on(daemon: &Daemon, node: &Node, told: &mut HashMap<PeerId, HashSet<[u8; 32]>>) -> Result<(), Problem> {
    let held = known(daemon).await?;
    if held.is_empty() {
        return Ok(());
    }
    let connections = node.network.connections();
    let peers: HashSet<_> = connections.iter().filter(|one| one.role == Role::Peer).map(|one| one.peer).collect();
    told.retain(|peer, _| peers.contains(peer));
    let hash = |key: &RefusedKey| *blake3::hash(&key.statement).as_bytes();
    let work = peers.into_iter().filter_map(|peer| {
        let before = told.get(&peer);
        let is_new = |key: &&RefusedKey| before.is_none_or(|before| !before.contains(&hash(key)));
        let news: Vec<_> = held.iter().filter(is_new).take(OFFERED_MAX).cloned().collect();
        (!news.is_empty()).then_some((peer, news))
    });
    let work: Vec<_> = work.collect();
    let done = stream::iter(work).map(|(peer, news)| async move {
        let offered = offer(node, peer, &news).await;
        (peer, news, offered)
    });
    let done: Vec<_> = done.buffer_unordered(TOLD_AT_ONCE).collect().await;
    for (peer, news, offered) in done {
        match offered {
            Ok(()) => told.entry(peer).or_default().extend(news.iter().map(hash)),
            Err(problem) => tracing::debug!(%peer, %problem, "statements were not taken"),
        }
    }
    Ok(())
}

async fn offer(node: &Node, peer: PeerId, held: &[RefusedKey]) -> Result<(), Problem> {
    for part in held.chunks(OFFERS_MAX) {
        let mut told = HashSet::new();
        for _ in 0..ROUNDS_MAX {
            let mut wanted = node.requester.offer(peer, part).await?;
            wanted.retain(|position| told.insert(*position));
            if wanted.is_empty() {
                break;
            }
            for position in wanted {
                // It may refuse one and follow the next.
                if let Err(problem) = node.requester.tell(peer, &part[position].statement).await {
                    tracing::debug!(%peer, %problem, "a statement was not followed");
                }
            }
        }
    }
    Ok(())
}

/// Tells peers of our own new key who have not confirmed it. Once all have, the former keys are destroyed.
async fn deliver(daemon: &Arc<Daemon>, node: &Arc<Node>) {
    let former = node.identity.former.list();
    if former.is_empty() {
        return;
    }
    let Ok(missing) = daemon.database.write(pending::missing).await else { return };
    let told = stream::iter(missing.iter().copied()).map(|peer| {
        let former = &former;
        async move { (peer, follows(node, peer, former).await) }
    });
    let told: Vec<_> = told.buffer_unordered(TOLD_AT_ONCE).collect().await;
    for (peer, _) in told.iter().filter(|(_, follows)| *follows) {
        confirm(daemon, *peer).await;
    }
    if told.iter().all(|(_, follows)| *follows) {
        let (own, key) = (daemon.clone(), node.identity.key.peer_id());
        // A task of the daemon's: it waits for what changes the identity, and must not be cut off with this node.
        daemon.tasks.spawn(async move {
            if let Err(problem) = own.forget_former(key, false).await {
                tracing::warn!(%problem, "the former key could not be destroyed");
            }
        });
    }
}

/// Notes that a peer follows our newest key.
pub async fn confirm(daemon: &Daemon, peer: PeerId) {
    let (name, now) = (daemon.name_of(&peer), clock::now());
    let noted = daemon.database.write(move |tx| -> Result<(), DatabaseError> {
        pending::confirm(tx, &peer)?;
        let (actor, action, outcome) = (peer.to_string(), "new key confirmed".to_owned(), Outcome::Allowed);
        audit::append(tx, &Entry { at: now, actor, action, outcome, detail: name })
    });
    match noted.await {
        Ok(()) => {
            daemon.notices.push("identity_confirmed", Some(peer.to_string()), None, "it knows the new key".into());
        }
        Err(error) => tracing::warn!(%error, "a confirmation could not be noted"),
    }
}

/// Whether a peer follows our newest key; it is told of each key in turn, from the oldest that it may still know.
async fn follows(node: &Node, peer: PeerId, former: &[FormerKey]) -> bool {
    if matches!(node.network.connection_state(peer), ConnectionState::Connected(_)) {
        return true;
    }
    let mut last = false;
    for FormerKey { key, statement } in former {
        last = match node.requester.tell_as(key, peer, statement).await {
            Told::Followed => true,
            Told::Refused => false,
            Told::Failed(problem) => {
                tracing::debug!(%peer, %problem, "the new key could not be told");
                return false;
            }
        };
    }
    last
}

/// Tells every connected peer, over the connections that stand, of a key that is about to be ours. Who follows ends these
/// connections at once, perhaps before his answer has come: the next connection, under the new key, is what confirms.
pub async fn tell_connected(node: &Node, statement: &Statement, patience: Duration) -> Vec<PeerId> {
    let connections = node.network.connections();
    let peers: HashSet<_> = connections.iter().filter(|one| one.role == Role::Peer).map(|one| one.peer).collect();
    let telling = stream::iter(peers.iter().copied()).map(|peer| node.requester.tell(peer, statement.as_bytes()));
    let told = telling.buffer_unordered(TOLD_AT_ONCE * 4).take_until(tokio::time::sleep(patience));
    told.for_each(|_| std::future::ready(())).await;
    peers.into_iter().collect()
}
