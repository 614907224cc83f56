//! The end of a permission, however it comes: a peer is removed, a grant is taken back or narrowed to nothing, or its time
//! is over. What it had let in ends at once, what runs is stopped.
//!
//! It is level-triggered: on each change of the trust list, at each grant's end, and at the start of the daemon, whatever
//! runs without a permission is looked for. A crash between two steps is therefore the same as a pause.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use peer_compute::record::Record;
use peer_compute::room::stop_all_of;
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use peer_proto::unit::Timestamp;
use peer_state::audit::{self, Entry, Outcome};
use peer_state::database::{DatabaseError, Tx};
use peer_trust::trust::{Snapshot, Trust};
use peer_trust::{kept, peers};

use crate::clock;
use crate::daemon::{Daemon, names_of};
use crate::node::Node;

/// How often the clock is looked at while a grant has an end: it may be set while we wait.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How long the wall clock must go on saying that a grant is over, where the monotonic clock says that it is not: what runs
/// is not stopped by one reading of a clock that jumped.
const CONFIRMATION: Duration = Duration::from_mins(5);

/// Waits until a peer is in the trust list no more.
pub(crate) async fn until_removed(trust: &Trust, peer: PeerId) {
    until(trust, |list| !list.peers.contains_key(&peer)).await;
}

/// Waits until a peer may deploy here no more.
pub(crate) async fn until_withdrawn(trust: &Trust, peer: PeerId) {
    until(trust, |list| !may_deploy(list, &peer, clock::now())).await;
}

async fn until(trust: &Trust, over: impl Fn(&Snapshot) -> bool) {
    if trust.watch().wait_for(|list| over(list)).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn may_deploy(list: &Snapshot, peer: &PeerId, now: Timestamp) -> bool {
    list.peers.get(peer).and_then(|record| record.grants.deploy.as_ref()).is_some_and(|grant| grant.is_live(now))
}

/// What happens to the deployments of a peer whose grants have been changed, in the transaction that changes them. Gives what
/// is being stopped, and how the audit log tells it.
pub(crate) fn after_change(
    tx: &Tx<'_>,
    peer: &PeerId,
    keep: bool,
    now: Timestamp,
) -> Result<(Vec<Record>, String), DatabaseError> {
    if peers::find_peer(tx, peer)?.is_some_and(|record| record.grants.may_deploy(now)) {
        kept::forget(tx, peer)?;
        return Ok((Vec::new(), String::new()));
    }
    if keep {
        kept::keep(tx, peer)?;
        return Ok((Vec::new(), "its deployments here are kept".to_owned()));
    }
    let taken = "its owner's permission to deploy on this machine was taken back; it can be started again when it is given anew";
    let stopped = stop(tx, peer, taken)?;
    let text = if stopped.is_empty() { String::new() } else { format!("stopped: {}", names_of(&stopped)) };
    Ok((stopped, text))
}

fn stop(tx: &Tx<'_>, peer: &PeerId, why: &str) -> Result<Vec<Record>, DatabaseError> {
    if kept::is_kept(tx, peer)? { Ok(Vec::new()) } else { stop_all_of(tx, peer, &Problem::new(Code::NotGranted, why)) }
}

/// Goes on with rows that have just been committed.
pub(crate) fn go_on(node: &Node, records: &[Record]) {
    if let Some(room) = &node.room {
        for record in records {
            room.committed(record);
        }
    }
}

/// Ends grants when their time is over, and whatever runs without one, until the node ends.
pub(crate) async fn follow(daemon: Arc<Daemon>, node: Arc<Node>) {
    let mut list = daemon.trust.watch();
    let mut doubts = Doubts::default();
    loop {
        let snapshot = list.borrow_and_update().clone();
        let next = match end_all(&daemon, &node, &snapshot, &mut doubts).await {
            Ok(next) => next,
            Err(error) => {
                tracing::error!(%error, "grants that are over could not be ended; trying again");
                Some(LOOK_AGAIN)
            }
        };
        let pause = async {
            match next {
                Some(pause) => tokio::time::sleep(pause).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = list.changed() => if changed.is_err() { return },
            () = pause => {}
        }
    }
}

/// Ends what is over now; gives the time until the next look.
async fn end_all(
    daemon: &Daemon,
    node: &Node,
    list: &Snapshot,
    doubts: &mut Doubts,
) -> Result<Option<Duration>, DatabaseError> {
    let (now, steady) = (clock::now(), clock::steady());
    let (mut next, mut ended) = (None, false);
    let running = running_owners(node).await?;
    for record in list.peers.values() {
        let end = record.grants.deploy.as_ref().and_then(|grant| grant.expires_at);
        if let Some(end) = end.filter(|end| *end > now) {
            doubts.clear(&record.peer);
            let rest = Duration::from_millis(end.since(now)).min(LOOK_AGAIN);
            next = Some(next.map_or(rest, |next: Duration| next.min(rest)));
            continue;
        }
        if end.is_some_and(|end| !doubts.settled(record.peer, end, steady, Instant::now())) {
            next = Some(LOOK_AGAIN);
            continue;
        }
        let to_tell = end.is_some() || running.contains(&record.peer);
        if to_tell && !may_deploy(list, &record.peer, now) {
            ended |= end_one(daemon, node, record.peer, now).await?;
        }
    }
    if ended {
        // Uploads and the like wait for a change of the list.
        daemon.trust.look_again();
    }
    Ok(next)
}

async fn running_owners(node: &Node) -> Result<HashSet<PeerId>, DatabaseError> {
    let Some(room) = &node.room else { return Ok(HashSet::new()) };
    let runs = |record: &Record| record.life.state().holds_share();
    Ok(room.all().await?.into_iter().filter(runs).map(|record| record.owner).collect())
}

/// Grants of which the two clocks say different things.
#[derive(Debug, Default)]
struct Doubts {
    since: HashMap<PeerId, (Timestamp, Instant)>,
}

impl Doubts {
    fn clear(&mut self, peer: &PeerId) {
        self.since.remove(peer);
    }

    /// Whether a grant that is over by the wall clock is over: by both clocks, or by the wall clock for long enough.
    fn settled(&mut self, peer: PeerId, end: Timestamp, steady: Timestamp, now: Instant) -> bool {
        if steady >= end {
            self.clear(&peer);
            return true;
        }
        let (doubted, since) = *self.since.entry(peer).or_insert((end, now));
        if doubted != end {
            self.since.insert(peer, (end, now));
            return false;
        }
        now.saturating_duration_since(since) >= CONFIRMATION
    }
}

/// Ends what one peer has here without a permission; says whether there was anything to tell.
async fn end_one(daemon: &Daemon, node: &Node, peer: PeerId, now: Timestamp) -> Result<bool, DatabaseError> {
    let ended = daemon.database.write(move |tx| -> Result<_, DatabaseError> {
        let Some(known) = peers::find_peer(tx, &peer)?.filter(|known| !known.grants.may_deploy(now)) else {
            return Ok(None);
        };
        let end = known.grants.deploy.and_then(|grant| grant.expires_at);
        let (why, news) = match end {
            Some(end) => ("its owner's permission to deploy on this machine has expired; it can be started again when it is renewed", kept::tell_end(tx, &peer, end)?),
            None => ("its owner has no permission to deploy on this machine; it can be started again when it is given", false),
        };
        let stopped = stop(tx, &peer, why)?;
        if stopped.is_empty() && !news {
            return Ok(None);
        }
        let detail = format!("{peer} '{}'; stopped: {}", known.name, names_of(&stopped));
        let (actor, action) = ("local".to_owned(), "grant ended".to_owned());
        audit::append(tx, &Entry { at: now, actor, action, outcome: Outcome::Allowed, detail })?;
        Ok(Some((known.name, stopped)))
    });
    let Some((name, stopped)) = ended.await? else { return Ok(false) };
    go_on(node, &stopped);
    let message = format!("the permission of '{name}' to deploy here has ended; stopped: {}", names_of(&stopped));
    daemon.notices.push("grant_ended", Some(peer.to_string()), None, message);
    Ok(true)
}

#[cfg(test)]
mod tests {
    use peer_proto::identity::Identity;

    use super::*;

    #[test]
    fn v3_a_clock_that_jumps_stops_nothing_and_one_that_was_set_does_after_a_while() {
        let (peer, end) = (Identity::generate().peer_id(), Timestamp(1_000_000));
        let (before, after) = (Timestamp(999_999), Timestamp(1_000_000));
        let (mut doubts, begun) = (Doubts::default(), Instant::now());
        assert!(doubts.settled(peer, end, after, begun), "both clocks agree");
        assert!(!doubts.settled(peer, end, before, begun));
        assert!(!doubts.settled(peer, end, before, begun + CONFIRMATION / 2));
        doubts.clear(&peer);
        assert!(!doubts.settled(peer, end, before, begun + CONFIRMATION), "it was a jump, and came back");
        assert!(doubts.settled(peer, end, before, begun + 2 * CONFIRMATION));
        assert!(!doubts.settled(peer, Timestamp(2_000_000), before, begun + 3 * CONFIRMATION), "another grant");
    }
}
