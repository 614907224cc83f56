//! What a statement about a key does to the trust list: the row moves to the new key, or ends, and the old key is refused
//! for ever. Everything is decided from what this machine knew of the key before; a stranger's word moves nothing.

use libp2p_identity::PeerId;
use peer_proto::card::SignedCard;
use peer_proto::code::{Code, Problem};
use peer_proto::envelope::DRIFT_MAX_MILLISECONDS;
use peer_proto::statement::{Content, Replacement, Revocation, Rotation, Statement};
use peer_proto::unit::Timestamp;
use peer_state::database::Tx;

use crate::kept;
use crate::pause;
use crate::peers::{self, PeerRecord};
use crate::refused_keys::{self, RefusedKey};
use crate::trust::{ChangeError, Snapshot, refused as refuse};

/// Most keys that one peer may have had in a row. Whoever needs more is added anew, by hand.
pub const MOVES_MAX: u32 = 64;

/// What a statement has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Followed {
    /// Nothing: it was in force already.
    Already,
    /// A peer goes on under a new key.
    Moved {
        /// As it was.
        former: Box<PeerRecord>,
        /// As it is.
        record: Box<PeerRecord>,
    },
    /// A peer is trusted no more.
    Ended {
        /// As it was.
        former: Box<PeerRecord>,
    },
    /// A key that was no peer's is refused from now on, because this machine's own user says so.
    Refused {
        /// The key.
        peer: PeerId,
    },
}

/// Who brings a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bearer {
    /// The user of this machine, who was handed it.
    Local,
    /// The user of this machine, who made it with a recovery phrase: he may also refuse a key that is no peer's.
    PhraseHolder,
    /// A peer, who may carry what he likes: it proves itself.
    Peer(PeerId),
}

/// Carries a statement out, or says why not.
pub(crate) fn follow(
    tx: &Tx<'_>,
    list: &Snapshot,
    statement: &Statement,
    bearer: Bearer,
    now: Timestamp,
) -> Result<Followed, ChangeError> {
    match statement.content() {
        Content::Rotation(rotation) => rotate(tx, list, statement, rotation, now),
        Content::Replacement(replacement) => replace(tx, list, statement, replacement, now),
        Content::Revocation(revocation) => revoke(tx, list, statement, revocation, bearer, now),
    }
}

fn rotate(
    tx: &Tx<'_>,
    list: &Snapshot,
    statement: &Statement,
    rotation: &Rotation,
    now: Timestamp,
) -> Result<Followed, ChangeError> {
    let new = rotation.card.card().peer;
    let Some(former) = list.peers.get(&rotation.old) else {
        return match refused_keys::find(tx, &rotation.old)? {
            Some(known) if known.successor() == Some(new) => Ok(Followed::Already),
            Some(_) => refuse(Code::RevokedKey, "another statement has ended this key already"),
            None => unknown(),
        };
    };
    if rotation.epoch <= former.epoch {
        return refuse(Code::Expired, "a later rotation of this machine is known already");
    }
    if rotation.card.card().recovery_key != recovery_key_of(former)? {
        return refuse(Code::WrongSigner, "a rotation cannot replace the recovery key of a machine");
    }
    let record = moved(list, former, &rotation.card, rotation.epoch, former.recovery_at)?;
    commit(tx, list, statement, former, record, now)
}

fn replace(
    tx: &Tx<'_>,
    list: &Snapshot,
    statement: &Statement,
    replacement: &Replacement,
    now: Timestamp,
) -> Result<Followed, ChangeError> {
    let new = replacement.card.card().peer;
    let former = match by_recovery(tx, list, statement, replacement.recovery_key, now)? {
        Target::Row(former) => former,
        Target::Ended(known) if known.statement == statement.as_bytes() => return Ok(Followed::Already),
        Target::Ended(_) => return refuse(Code::RevokedKey, "another statement has ended this key already"),
    };
    if former.peer == new {
        return Ok(Followed::Already);
    }
    // The word of the recovery key stands above all that the old key has said; epochs begin anew.
    let record = moved(list, former, &replacement.card, 0, replacement.issued_at)?;
    commit(tx, list, statement, former, record, now)
}

fn revoke(
    tx: &Tx<'_>,
    list: &Snapshot,
    statement: &Statement,
    revocation: &Revocation,
    bearer: Bearer,
    now: Timestamp,
) -> Result<Followed, ChangeError> {
    let former = match by_recovery(tx, list, statement, revocation.recovery_key, now) {
        Ok(Target::Row(former)) => former,
        Ok(Target::Ended(_)) => return Ok(Followed::Already),
        Err(ChangeError::Refused(problem)) if problem.code == Code::UnknownPeer && bearer == Bearer::PhraseHolder => {
            let peer = revocation.peer;
            refused_keys::put(tx, &RefusedKey::new(peer, None, None, statement, now))?;
            return Ok(Followed::Refused { peer });
        }
        Err(error) => return Err(error),
    };
    peers::delete_peer(tx, &former.peer)?;
    end(tx, statement, former, None, now)?;
    Ok(Followed::Ended { former: Box::new(former.clone()) })
}

/// About whom the recovery key speaks.
enum Target<'a> {
    /// A peer.
    Row(&'a PeerRecord),
    /// A key that the recovery key has ended before.
    Ended(Box<RefusedKey>),
}

/// The peer that a statement of the recovery key is about: one of the keys that it names, or the key to which that one has
/// rotated here. Whoever had the old key may have rotated it to his own.
fn by_recovery<'a>(
    tx: &Tx<'_>,
    list: &'a Snapshot,
    statement: &Statement,
    recovery_key: [u8; 32],
    now: Timestamp,
) -> Result<Target<'a>, ChangeError> {
    if statement.issued_at() > now.plus(DRIFT_MAX_MILLISECONDS) {
        return refuse(Code::ClockDrift, "the statement comes from the future; one of the two clocks is wrong");
    }
    let mut ended = None;
    for subject in statement.subjects() {
        let mut key = *subject;
        for _ in 0..=MOVES_MAX {
            if let Some(row) = list.peers.get(&key) {
                if recovery_key_of(row)? != recovery_key {
                    return refuse(
                        Code::WrongSigner,
                        "the statement is not signed by the recovery key of this machine",
                    );
                }
                if statement.issued_at() <= row.recovery_at {
                    return refuse(Code::Expired, "a later statement of the recovery key is known already");
                }
                return Ok(Target::Row(row));
            }
            match refused_keys::find(tx, &key)? {
                Some(known) if !known.by_recovery => match known.successor() {
                    Some(successor) => key = successor,
                    None => break,
                },
                Some(known) => {
                    ended = Some(known);
                    break;
                }
                None => break,
            }
        }
    }
    ended.map_or_else(unknown, |known| Ok(Target::Ended(Box::new(known))))
}

fn unknown<T>() -> Result<T, ChangeError> {
    refuse(Code::UnknownPeer, "the statement is about a key that is no peer's here")
}

fn recovery_key_of(record: &PeerRecord) -> Result<[u8; 32], ChangeError> {
    record.recovery_key().ok_or_else(|| {
        ChangeError::Refused(Problem::new(Code::Internal, "the card of this peer cannot be read; add it anew"))
    })
}

/// The record of a peer under its new key. Name and grants stay; if the new key is a peer already, it keeps its own.
fn moved(
    list: &Snapshot,
    former: &PeerRecord,
    card: &SignedCard,
    epoch: u64,
    recovery_at: Timestamp,
) -> Result<PeerRecord, ChangeError> {
    let moves = former.moves + 1;
    if moves > MOVES_MAX {
        return refuse(Code::OverLimit, "this peer has changed its key too often; remove it and add it anew");
    }
    let mut record = match list.peers.get(&card.card().peer) {
        Some(present) => present.clone(),
        None => PeerRecord::new(card, former.name.clone(), former.grants.clone(), former.added_at),
    };
    (record.epoch, record.recovery_at, record.moves) = (epoch.max(record.epoch), recovery_at, moves);
    Ok(record)
}

fn commit(
    tx: &Tx<'_>,
    list: &Snapshot,
    statement: &Statement,
    former: &PeerRecord,
    record: PeerRecord,
    now: Timestamp,
) -> Result<Followed, ChangeError> {
    if refused_keys::find(tx, &record.peer)?.is_some() {
        return refuse(Code::RevokedKey, "the new key that the statement names is refused itself");
    }
    if list.invitations.contains_key(&record.peer) {
        return refuse(Code::InvalidArgument, "the new key that the statement names is that of an invitation");
    }
    peers::delete_peer(tx, &former.peer)?;
    peers::put_peer(tx, &record)?;
    if kept::is_kept(tx, &former.peer)? {
        kept::keep(tx, &record.peer)?;
        kept::forget(tx, &former.peer)?;
    }
    end(tx, statement, former, Some(record.peer), now)?;
    Ok(Followed::Moved { former: Box::new(former.clone()), record: Box::new(record) })
}

/// Refuses the key of the row, and notes the recovery key's word with each key that it names and that is refused already.
/// What the owner of this machine has paused stays paused.
fn end(
    tx: &Tx<'_>,
    statement: &Statement,
    former: &PeerRecord,
    successor: Option<PeerId>,
    now: Timestamp,
) -> Result<(), ChangeError> {
    pause::succeed(tx, &former.peer, successor.as_ref())?;
    let name = Some(former.name.clone());
    refused_keys::put(tx, &RefusedKey::new(former.peer, name, successor, statement, now))?;
    for subject in statement.subjects().iter().filter(|subject| **subject != former.peer) {
        if let Some(known) = refused_keys::find(tx, subject)?.filter(|known| !known.by_recovery) {
            refused_keys::put(tx, &RefusedKey::new(*subject, known.name, successor, statement, now))?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "follow_tests.rs"]
mod tests;
