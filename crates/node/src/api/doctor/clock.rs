//! The clock: against what it has shown already, and against the clocks of peers.

use std::cmp::Ordering;
use std::time::Duration;

use futures::future::join_all;
use peer_net::Role;
use peer_proto::PeerId;
use peer_proto::control::Finding;
use peer_proto::envelope::DRIFT_MAX_MILLISECONDS;
use peer_proto::query::Query;
use peer_proto::unit::{Timestamp, in_words};
use peer_state::audit::{self, Entry, Outcome};
use peer_state::database::{DatabaseError, Tx};
use peer_trust::floor;

use super::{Examined, failure, note, ok, warning};
use crate::clock;
use crate::daemon::Daemon;
use crate::node::Node;

/// The clock cannot be right if it stands before the year in which this program was written.
const CLOCK_FLOOR: Timestamp = Timestamp(1_767_225_600_000);
/// A clock that differs by less is right; a greeting takes its time, too (milliseconds).
const DIFFERENCE_MIN: u64 = 10_000;
/// Peers that are asked for their time by one examination.
const ASKED_MAX: usize = 8;
/// How long one of them may take.
const ASKING_MAX: Duration = Duration::from_secs(2);

pub(super) async fn check(examined: &Examined) -> Result<Vec<Finding>, DatabaseError> {
    let mut findings = vec![against_itself(&examined.daemon).await?];
    if let Ok(node) = &examined.node {
        ask(node).await;
        findings.push(against_peers(&node.requester.clocks_of_peers()));
    }
    Ok(findings)
}

/// Requests bear the time; a clock that went back, or never was set, makes every peer refuse them.
async fn against_itself(daemon: &Daemon) -> Result<Finding, DatabaseError> {
    const CHECK: &str = "clock";
    let now = clock::now();
    let latest = daemon.database.write(floor::latest).await?;
    Ok(if now < CLOCK_FLOOR {
        failure(CHECK, "the clock was never set", "set it (timedatectl set-ntp true); peers refuse requests until then")
    } else if now.plus(DRIFT_MAX_MILLISECONDS) < latest {
        let message = format!("the clock stands {} before what it has shown already", in_words(latest.since(now)));
        let advice = "set it (timedatectl set-ntp true), or, if it is right now, run: peerctl doctor --accept-clock; \
                      requests are refused until then";
        failure(CHECK, message, advice)
    } else {
        ok(CHECK, "the clock has not gone back")
    })
}

/// Peers greet with their time, whatever is asked.
async fn ask(node: &Node) {
    let connections = node.network.connections();
    let mut peers: Vec<PeerId> = connections.iter().filter(|one| one.role == Role::Peer).map(|one| one.peer).collect();
    peers.sort_unstable();
    peers.dedup();
    peers.truncate(ASKED_MAX);
    // One that does not answer is told by the check of peers.
    join_all(peers.iter().map(|peer| tokio::time::timeout(ASKING_MAX, node.requester.query(*peer, Query::Capacity))))
        .await;
}

/// Peers' names, and by how much their clocks stood ahead of ours (milliseconds). Only when most of them say the same of
/// our clock is it taken for wrong: one peer could say anything.
fn against_peers(seen: &[(String, i64)]) -> Finding {
    const CHECK: &str = "clock_peers";
    if seen.is_empty() {
        return ok(CHECK, "no peer has shown its clock lately");
    }
    let beyond =
        |limit: u64| -> Vec<&(String, i64)> { seen.iter().filter(|(_, ahead)| ahead.unsigned_abs() > limit).collect() };
    let differing = beyond(DIFFERENCE_MIN);
    let Some((name, most)) = differing.iter().max_by_key(|(_, ahead)| ahead.unsigned_abs()) else {
        return ok(CHECK, format!("the clocks of {} peers agree with this one", seen.len()));
    };
    let agree = |list: &[&(String, i64)], side: Ordering| {
        2 * list.iter().filter(|(_, ahead)| ahead.cmp(&0) == side).count() > seen.len()
    };
    let is_most = |list: &[&(String, i64)]| agree(list, Ordering::Greater) || agree(list, Ordering::Less);
    let side = if *most > 0 { "ahead of" } else { "behind" };
    let example = format!("that of {name} is {} {side} it", in_words(most.unsigned_abs()));
    if is_most(&beyond(DRIFT_MAX_MILLISECONDS)) {
        let message = format!("this clock differs from those of most peers: {example}; they refuse requests");
        return failure(CHECK, message, "set it: timedatectl set-ntp true");
    }
    if is_most(&differing) {
        let message = format!("this clock differs from those of most peers: {example}");
        return warning(CHECK, message, "set it (timedatectl set-ntp true) before the difference reaches five minutes");
    }
    note(CHECK, format!("most peers' clocks agree with this one, but {example}"), format!("tell {name}'s owner"))
}

/// Takes the present time for right: the way out when the clock once stood in the future.
pub(super) async fn accept(daemon: &Daemon) -> Result<(), DatabaseError> {
    let run = daemon.run.clone();
    let accept = move |tx: &Tx<'_>| -> Result<(), DatabaseError> {
        let now = clock::now();
        let former = run.accept_clock(tx, now)?;
        let (actor, action, outcome) = ("local".to_owned(), "clock accepted".to_owned(), Outcome::Allowed);
        let detail = format!("latest time seen: {} ms -> {} ms", former.0, now.0);
        audit::append(tx, &Entry { at: now, actor, action, outcome, detail })
    };
    daemon.database.write(accept).await
}

#[cfg(test)]
mod tests {
    use peer_proto::control::Level;

    use super::*;

    fn level(ahead: &[i64]) -> Level {
        let seen: Vec<_> = ahead.iter().enumerate().map(|(n, ahead)| (format!("peer{n}"), *ahead)).collect();
        against_peers(&seen).level
    }

    #[test]
    fn most_peers_decide_whose_clock_is_wrong() {
        const LITTLE: i64 = 30_000;
        const MUCH: i64 = 400_000;
        assert_eq!(level(&[]), Level::Ok);
        assert_eq!(level(&[900, -4_000]), Level::Ok);
        assert_eq!(level(&[LITTLE]), Level::Warning);
        assert_eq!(level(&[-MUCH]), Level::Failure);
        assert_eq!(level(&[MUCH, 10, -10]), Level::Note, "one peer alone may say anything");
        assert_eq!(level(&[MUCH, MUCH, 0]), Level::Failure);
        assert_eq!(level(&[MUCH, LITTLE, 0]), Level::Warning);
        assert_eq!(level(&[MUCH, -MUCH]), Level::Note, "they do not agree");
        assert_eq!(level(&[i64::MIN, i64::MIN]), Level::Failure);
    }
}
