//! The end of trust, and of what a peer has here.

use std::collections::BTreeSet;
use std::sync::Arc;

use peer_compute::record::{self, Record};
use peer_compute::room::end_all_of;
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use peer_proto::control::RemovedPeer;
use peer_proto::deploy::State;
use peer_proto::id::Name;
use peer_proto::text::escape;
use peer_state::audit::{self, Entry, Outcome};
use peer_state::database::{DatabaseError, Tx};
use peer_trust::kept;
use peer_trust::trust::Snapshot;
use serde::Deserialize;

use super::super::Failure;
use crate::clock;
use crate::daemon::{Daemon, names_of};
use crate::introduction::until;
use crate::node::Node;
use crate::withdrawal::go_on;

/// Letters of a PeerId that are enough to name an owner, if it is the only one.
const PREFIX_MIN: usize = 4;

#[derive(Deserialize)]
pub(super) struct Removal {
    #[serde(default)]
    keep_deployments: bool,
    #[serde(default)]
    force: bool,
}

pub(super) async fn remove(daemon: Arc<Daemon>, text: String, removal: Removal) -> Result<RemovedPeer, Failure> {
    let node = daemon.node().await?;
    let list = daemon.trust.snapshot();
    let found = match list.find(&text) {
        Ok(found) => found,
        Err(problem) if problem.code == Code::UnknownPeer && !removal.keep_deployments => {
            return remove_former(&daemon, &node, text, list.clone(), problem).await;
        }
        Err(problem) => return Err(problem.into()),
    };
    let out_of_reach = ours_there(&node, found.peer).await?;
    if !out_of_reach.is_empty() && !removal.force {
        return Err(ours_are_there(&found.name, &out_of_reach).into());
    }
    let (peer, keep) = (found.peer, removal.keep_deployments);
    let removed = daemon.trust.remove(peer, clock::now(), move |tx| end_or_keep(tx, &peer, keep));
    let (record, ended) = removed.await?;
    go_on(&node, &ended);
    until(&node.network, peer, false).await;
    let message = format!("'{}' was removed", record.name);
    daemon.notices.push("peer_removed", Some(peer.to_string()), None, message);
    let ended = ended.into_iter().map(|record| record.specification.name).collect();
    Ok(RemovedPeer { peer_id: peer.to_string(), name: Some(record.name), ended, out_of_reach })
}

/// What happens to the deployments of a peer in the transaction that removes it, and how the audit log tells it.
fn end_or_keep(tx: &Tx<'_>, peer: &PeerId, keep: bool) -> Result<(Vec<Record>, String), DatabaseError> {
    if keep {
        kept::keep(tx, peer)?;
        return Ok((Vec::new(), "its deployments here are kept".to_owned()));
    }
    kept::forget(tx, peer)?;
    let ended = end_all_of(tx, peer)?;
    let text = format!("its deployments here are ended: {}", names_of(&ended));
    Ok((ended, text))
}

/// Ends the deployments that were kept of an owner who is no peer any more.
async fn remove_former(
    daemon: &Daemon,
    node: &Node,
    text: String,
    list: Arc<Snapshot>,
    unknown: Problem,
) -> Result<RemovedPeer, Failure> {
    let now = clock::now();
    let ended = daemon.database.write(move |tx| -> Result<_, DatabaseError> {
        let fits = |owner: &PeerId| {
            let id = owner.to_string();
            id == text || (text.len() >= PREFIX_MIN && (id.starts_with(&text) || id.ends_with(&text)))
        };
        let owners: BTreeSet<_> = record::all(tx)?.into_iter().map(|record| record.owner).collect();
        let mut found = owners.into_iter().filter(|owner| !list.peers.contains_key(owner) && fits(owner));
        let owner = match (found.next(), found.next()) {
            (Some(owner), None) => owner,
            (None, _) => return Ok(Err(unknown)),
            (Some(_), Some(_)) => {
                let message = format!("'{}' fits more than one owner; write more of the PeerId", escape(&text));
                return Ok(Err(Problem::new(Code::Ambiguous, message)));
            }
        };
        let ended = end_all_of(tx, &owner)?;
        kept::forget(tx, &owner)?;
        let (actor, action, outcome) = ("local".to_owned(), "kept deployments ended".to_owned(), Outcome::Allowed);
        let detail = format!("{owner}: {}", names_of(&ended));
        audit::append(tx, &Entry { at: now, actor, action, outcome, detail })?;
        Ok(Ok((owner, ended)))
    });
    let (owner, ended) = ended.await??;
    go_on(node, &ended);
    let ended = ended.into_iter().map(|record| record.specification.name).collect();
    Ok(RemovedPeer { peer_id: owner.to_string(), name: None, ended, out_of_reach: Vec::new() })
}

/// Our own deployments on a peer, as far as we remember, without those that failed.
async fn ours_there(node: &Node, peer: PeerId) -> Result<Vec<Name>, Problem> {
    let remembered = node.requester.remembered().await?;
    let there = remembered.into_iter().filter(|one| one.peer == peer && one.status.state != State::Failed);
    Ok(there.map(|one| one.status.specification.name).collect())
}

fn ours_are_there(name: &Name, ours: &[Name]) -> Problem {
    let names: Vec<_> = ours.iter().map(Name::as_str).collect();
    let message = format!(
        "you have deployments on '{name}' that you could not reach or end any more: {}; remove them first (peerctl rm \
         NAME), or leave them behind with --force",
        names.join(", ")
    );
    Problem::new(Code::DeploymentsThere, message)
}
