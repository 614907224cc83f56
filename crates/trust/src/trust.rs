//! The living trust list: changes are durable before they act, and act at once on whoever watches.

mod following;

use std::collections::BTreeMap;
use std::sync::Arc;

use libp2p_identity::PeerId;
use peer_proto::Multiaddr;
use peer_proto::card::SignedCard;
use peer_proto::code::{Code, Problem, Threat};
use peer_proto::grant::{DeployGrant, Grants};
use peer_proto::id::Name;
use peer_proto::limits::{Bounds, LimitKey};
use peer_proto::unit::Timestamp;
use peer_state::audit::{self, Entry, Outcome};
use peer_state::database::{Database, DatabaseError, Tx};
use tokio::sync::{Mutex, watch};

use crate::pause::{self, Subject};
use crate::peers::{self, InvitationRecord, ListError, PeerRecord};
use crate::{detail, floor, kept, refused_keys};

/// Most peers in the list.
pub const PEERS_MAX: usize = 1024;
/// Most open invitations.
pub const INVITATIONS_MAX: usize = 64;
/// Longest life of an invitation (milliseconds): one hour (SECURITY M7).
pub const INVITATION_LIFE_MAX_MILLISECONDS: u64 = 3_600_000;

/// The list at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Peers by PeerId.
    pub peers: BTreeMap<PeerId, PeerRecord>,
    /// Invitations by the PeerId of their one-time key; those that have ended may still be in it.
    pub invitations: BTreeMap<PeerId, InvitationRecord>,
}

impl Snapshot {
    /// Finds a peer by its name, its PeerId, or a prefix or suffix of the PeerId of four or more letters that fits only one.
    pub fn find(&self, text: &str) -> Result<&PeerRecord, Problem> {
        if let Some(peer) = self.peers.values().find(|peer| peer.name.as_str() == text || peer.peer.to_string() == text)
        {
            return Ok(peer);
        }
        let fits = |peer: &&PeerRecord| {
            let id = peer.peer.to_string();
            text.len() >= 4 && (id.starts_with(text) || id.ends_with(text))
        };
        let mut found = self.peers.values().filter(fits);
        let shown = peer_proto::text::escape(text);
        match (found.next(), found.next()) {
            (Some(peer), None) => Ok(peer),
            (Some(_), Some(_)) => Err(Problem::new(
                Code::Ambiguous,
                format!("'{shown}' fits more than one peer; write more of the PeerId"),
            )),
            (None, _) => Err(Problem::new(
                Code::UnknownPeer,
                format!("no peer is called '{shown}'; `peerctl peers list` shows those that you have added"),
            )),
        }
    }
}

/// What becomes of a machine that is to be added and is in the list already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repeated {
    /// It is refused: whoever hands a card over does not mean to change what is there.
    Refused,
    /// Its card is renewed, and its name and grants are replaced if new ones are given: it has answered for itself.
    Renewed,
}

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// It does not fit the list.
    #[error("{0}")]
    Refused(Problem),
    /// The list is damaged.
    #[error(transparent)]
    List(#[from] ListError),
}

impl From<DatabaseError> for ChangeError {
    fn from(error: DatabaseError) -> Self {
        Self::List(error.into())
    }
}

pub(crate) fn refused<T>(code: Code, message: impl Into<String>) -> Result<T, ChangeError> {
    Err(ChangeError::Refused(Problem::new(code, message)))
}

/// A handle to the trust list; clones share it.
#[derive(Debug, Clone)]
pub struct Trust {
    database: Database,
    /// Held from before a change is committed until it has been published, so that watchers see changes in their order.
    order: Arc<Mutex<()>>,
    sender: Arc<watch::Sender<Arc<Snapshot>>>,
}

impl Trust {
    /// Reads the list and checks its seal.
    pub fn open(database: Database) -> Result<Self, ListError> {
        let snapshot = database.write_blocking(snapshot)?;
        let sender = Arc::new(watch::Sender::new(Arc::new(snapshot)));
        Ok(Self { database, order: Arc::default(), sender })
    }

    /// The list now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.sender.borrow().clone()
    }

    /// Follows the list.
    pub fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.sender.subscribe()
    }

    /// Has everybody who watches the list look at it again: time may have ended what it says.
    pub fn look_again(&self) {
        self.sender.send_modify(|_| {});
    }

    /// Adds a machine by its card. If it is in the list already, `repeated` decides.
    pub async fn add(
        &self,
        card: SignedCard,
        name: Option<Name>,
        grants: Grants,
        repeated: Repeated,
        now: Timestamp,
    ) -> Result<PeerRecord, ChangeError> {
        let action = match repeated {
            Repeated::Refused => "peer added",
            Repeated::Renewed => "peer joined",
        };
        self.change(local(now, action), move |tx, list| match repeated {
            Repeated::Refused => {
                let record = insert(tx, list, &card, name, grants, now)?;
                let detail = detail::met(None, &record);
                Ok((record, detail))
            }
            Repeated::Renewed => {
                let grants = (grants != Grants::default()).then_some(grants);
                meet(tx, list, &card, name, grants, now)
            }
        })
        .await
    }

    /// Adds the machine at `address` that redeems an invitation, or renews what is known of it. The invitation is used up
    /// in the same transaction.
    pub async fn redeem(
        &self,
        ticket: PeerId,
        card: SignedCard,
        address: String,
        now: Timestamp,
    ) -> Result<PeerRecord, ChangeError> {
        let change = Change { actor: card.card().peer.to_string(), ..local(now, "invitation used") };
        self.change(change, move |tx, list| {
            if let Err(problem) = floor::pass(tx, now)? {
                return Err(ChangeError::Refused(problem));
            }
            let invitation = peers::take_invitation(tx, &ticket)?.filter(|invitation| now < invitation.expires_at);
            let Some(invitation) = invitation else {
                return refused(Code::InvalidTicket, "this invitation is unknown, used or expired; ask for a new one");
            };
            let (record, met) = meet(tx, list, &card, invitation.name, Some(invitation.grants), now)?;
            Ok((record, format!("{met}; invitation {ticket}, from {address}")))
        })
        .await
    }

    /// Removes a peer. `and` does, in the same transaction, what must not be lost when the list has changed; its text is
    /// for the audit log.
    pub async fn remove<T, F>(&self, peer: PeerId, now: Timestamp, and: F) -> Result<(PeerRecord, T), ChangeError>
    where
        T: Send + 'static,
        F: FnOnce(&Tx<'_>) -> Result<(T, String), DatabaseError> + Send + 'static,
    {
        self.change(local(now, "peer removed"), move |tx, list| match list.peers.get(&peer) {
            Some(record) if peers::delete_peer(tx, &peer)? => {
                pause::clear(tx, &Subject::Peer(peer))?;
                let (value, more) = and(tx)?;
                Ok(((record.clone(), value), detail::gone(record, &more)))
            }
            _ => refused(Code::UnknownPeer, format!("{peer} is not in the list")),
        })
        .await
    }

    /// Changes a peer's name, grants or addresses; what is `None` stays. `and` does, in the same transaction, what follows from
    /// the change; its text is for the audit log.
    pub async fn update<T, F>(
        &self,
        peer: PeerId,
        name: Option<Name>,
        grants: Option<Grants>,
        addresses: Option<Vec<Multiaddr>>,
        now: Timestamp,
        and: F,
    ) -> Result<(PeerRecord, T), ChangeError>
    where
        T: Send + 'static,
        F: FnOnce(&Tx<'_>) -> Result<(T, String), DatabaseError> + Send + 'static,
    {
        self.change(local(now, "peer changed"), move |tx, list| {
            let Some(former) = list.peers.get(&peer) else {
                return refused(Code::UnknownPeer, format!("{peer} is not in the list"));
            };
            let mut record = former.clone();
            if let Some(name) = name {
                free_name(list, &name, &peer)?;
                record.name = name;
            }
            record.grants = grants.unwrap_or(record.grants);
            if let Some(addresses) = addresses {
                record.set_addresses(addresses);
            }
            peers::put_peer(tx, &record)?;
            let (value, more) = and(tx)?;
            let separator = if more.is_empty() { "" } else { "; " };
            let detail = format!("{}{separator}{more}", detail::met(Some(former), &record));
            Ok(((record, value), detail))
        })
        .await
    }

    /// Changes the limits of a peer that may deploy here. Taken back, those that every grant has become what a grant has
    /// that names none.
    pub async fn bound(
        &self,
        peer: PeerId,
        set: Bounds,
        unset: Vec<LimitKey>,
        now: Timestamp,
    ) -> Result<PeerRecord, ChangeError> {
        self.change(local(now, "limits changed"), move |tx, list| {
            let Some(former) = list.peers.get(&peer) else {
                return refused(Code::UnknownPeer, format!("{peer} is not in the list"));
            };
            let mut record = former.clone();
            let Some(deploy) = &mut record.grants.deploy else {
                let name = &former.name;
                let message =
                    format!("'{name}' may not deploy here; run first: peerctl peers allow {name} --allow deploy");
                return refused(Code::NotGranted, message);
            };
            let mut bounds = deploy.bounds();
            bounds.change(&Bounds::default(), &unset);
            let mut usual = DeployGrant::usual().bounds();
            usual.change(&bounds, &[]);
            usual.change(&set, &[]);
            deploy.set_bounds(usual);
            peers::put_peer(tx, &record)?;
            let detail = detail::met(Some(former), &record);
            Ok((record, detail))
        })
        .await
    }

    /// Opens an invitation. Those that have ended are cleared away.
    pub async fn invite(&self, invitation: InvitationRecord, now: Timestamp) -> Result<(), ChangeError> {
        if invitation.expires_at.since(now) > INVITATION_LIFE_MAX_MILLISECONDS || invitation.expires_at <= now {
            return refused(
                Code::InvalidArgument,
                "an invitation lives at most one hour: choose --ticket-expires up to 1h",
            );
        }
        self.change(local(now, "invitation made"), move |tx, list| {
            if let Err(problem) = floor::pass(tx, now)? {
                return Err(ChangeError::Refused(problem));
            }
            for ended in list.invitations.values().filter(|open| open.expires_at <= now) {
                peers::take_invitation(tx, &ended.ticket)?;
            }
            if list.invitations.values().filter(|open| open.expires_at > now).count() >= INVITATIONS_MAX {
                return refused(Code::OverLimit, format!("{INVITATIONS_MAX} invitations are open; revoke some first"));
            }
            if let Some(name) = &invitation.name {
                free_name(list, name, &invitation.ticket)?;
            }
            peers::put_invitation(tx, &invitation)?;
            Ok(((), detail::invitation(&invitation)))
        })
        .await
    }

    /// Withdraws an invitation.
    pub async fn revoke(&self, ticket: PeerId, now: Timestamp) -> Result<InvitationRecord, ChangeError> {
        self.change(local(now, "invitation revoked"), move |tx, _| match peers::take_invitation(tx, &ticket)? {
            Some(invitation) => {
                let detail = detail::invitation(&invitation);
                Ok((invitation, detail))
            }
            None => refused(Code::InvalidTicket, "no open invitation has this id; `peerctl invite list` shows them"),
        })
        .await
    }

    /// Makes one change: read, checked, sealed, audited and committed together, then published. From the moment at which it
    /// begins it comes to its end, even if whoever asked for it goes away: a committed change is always published.
    async fn change<T, F>(&self, change: Change, work: F) -> Result<T, ChangeError>
    where
        T: Send + 'static,
        F: FnOnce(&Tx<'_>, &Snapshot) -> Result<(T, String), ChangeError> + Send + 'static,
    {
        let order = self.order.clone().lock_owned().await;
        let sender = self.sender.clone();
        let changed = self.database.run(move |database| {
            let _order = order;
            let changed = database.write_blocking(|tx| commit(tx, &change, work));
            match changed {
                Ok((value, after)) => {
                    sender.send_replace(Arc::new(after));
                    Ok(value)
                }
                Err(ChangeError::Refused(problem)) => {
                    database.write_blocking(|tx| audit::append(tx, &change.refused(&problem)))?;
                    Err(ChangeError::Refused(problem))
                }
                Err(error) => Err(error),
            }
        });
        changed.await?
    }
}

fn commit<T, F>(tx: &Tx<'_>, change: &Change, work: F) -> Result<(T, Snapshot), ChangeError>
where
    F: FnOnce(&Tx<'_>, &Snapshot) -> Result<(T, String), ChangeError>,
{
    let (value, detail) = work(tx, &snapshot(tx)?)?;
    peers::seal(tx)?;
    // Not every change depends on the time; those that do have refused a clock that went back.
    drop(floor::pass(tx, change.at)?);
    audit::append(tx, &change.entry(Outcome::Allowed, detail))?;
    Ok((value, snapshot(tx)?))
}

/// Who changes what.
struct Change {
    at: Timestamp,
    actor: String,
    action: &'static str,
}

fn local(at: Timestamp, action: &'static str) -> Change {
    Change { at, actor: "local".into(), action }
}

impl Change {
    fn entry(&self, outcome: Outcome, detail: String) -> Entry {
        Entry { at: self.at, actor: self.actor.clone(), action: self.action.into(), outcome, detail }
    }

    fn refused(&self, problem: &Problem) -> Entry {
        let threat = match problem.code {
            Code::InvalidTicket => Threat::V1,
            Code::ClockBehind | Code::Expired | Code::ClockDrift => Threat::V3,
            Code::RevokedKey => Threat::I3,
            Code::WrongSigner => Threat::V2,
            _ => Threat::G4,
        };
        self.entry(Outcome::Refused(threat), problem.message.clone())
    }
}

fn snapshot(tx: &Tx<'_>) -> Result<Snapshot, ListError> {
    let rows = peers::load(tx)?;
    Ok(Snapshot {
        peers: rows.peers.into_iter().map(|peer| (peer.peer, peer)).collect(),
        invitations: rows.invitations.into_iter().map(|open| (open.ticket, open)).collect(),
    })
}

fn insert(
    tx: &Tx<'_>,
    list: &Snapshot,
    card: &SignedCard,
    name: Option<Name>,
    grants: Grants,
    now: Timestamp,
) -> Result<PeerRecord, ChangeError> {
    let peer = card.card().peer;
    if let Some(existing) = list.peers.get(&peer) {
        return refused(
            Code::PeerExists,
            format!("this machine is a peer already, as '{}'; change it with `peerctl peers allow {0}`", existing.name),
        );
    }
    if refused_keys::find(tx, &peer)?.is_some() {
        return refused(
            Code::RevokedKey,
            "the key of this card has been ended, by its machine or by its recovery key, and is refused for ever; ask for \
             the card of the machine's new key",
        );
    }
    if list.peers.len() >= PEERS_MAX {
        return refused(Code::OverLimit, format!("the list holds {PEERS_MAX} peers, its limit; remove some first"));
    }
    let name = match name {
        Some(name) => {
            free_name(list, &name, &peer)?;
            name
        }
        None => suggested_name(list, &card.card().name, &peer),
    };
    let record = PeerRecord::new(card, name, grants, now);
    peers::put_peer(tx, &record)?;
    kept::forget(tx, &peer)?;
    Ok(record)
}

/// Adds a machine that has proved its key, or renews what is known of it.
fn meet(
    tx: &Tx<'_>,
    list: &Snapshot,
    card: &SignedCard,
    name: Option<Name>,
    grants: Option<Grants>,
    now: Timestamp,
) -> Result<(PeerRecord, String), ChangeError> {
    let former = list.peers.get(&card.card().peer);
    let record = match former {
        None => insert(tx, list, card, name, grants.unwrap_or_default(), now)?,
        Some(known) => {
            if known.recovery_key().is_some_and(|key| key != card.card().recovery_key) {
                return refused(
                    Code::WrongSigner,
                    "this machine is a peer already, with another recovery key; only the recovery key itself could change that",
                );
            }
            let mut record = known.clone();
            record.refresh(card);
            if let Some(name) = name {
                free_name(list, &name, &record.peer)?;
                record.name = name;
            }
            if let Some(mut grants) = grants {
                keep_bounds(&mut grants, &record.grants);
                record.grants = grants;
            }
            peers::put_peer(tx, &record)?;
            record
        }
    };
    let detail = detail::met(former, &record);
    Ok((record, detail))
}

/// Limits that were set for a peer outlive an invitation that says nothing of them.
fn keep_bounds(grants: &mut Grants, former: &Grants) {
    if let (Some(deploy), Some(former)) = (&mut grants.deploy, &former.deploy) {
        let set = deploy.bounds();
        let mut bounds = former.bounds();
        bounds.change(&set, &[]);
        deploy.set_bounds(bounds);
    }
}

fn free_name(list: &Snapshot, name: &Name, peer: &PeerId) -> Result<(), ChangeError> {
    match list.peers.values().find(|other| other.name == *name && other.peer != *peer) {
        Some(_) => refused(Code::NameTaken, format!("another peer is called '{name}'; choose a name with --name")),
        None => Ok(()),
    }
}

/// The name that the other machine suggests, made unique with the end of its PeerId where it is taken.
fn suggested_name(list: &Snapshot, suggested: &Name, peer: &PeerId) -> Name {
    if list.peers.values().all(|other| other.name != *suggested) {
        return suggested.clone();
    }
    let id = peer.to_string().to_ascii_lowercase();
    let base: String = suggested.as_str().chars().take(50).collect();
    format!("{base}-{}", &id[id.len().saturating_sub(8)..]).parse().unwrap_or_else(|_| suggested.clone())
}

#[cfg(test)]
#[path = "trust_tests.rs"]
mod tests;
