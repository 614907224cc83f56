//! A new key for this machine, and the end of keys of machines that were lost.
//!
//! The key file is what counts. It names the new key and keeps the old one with the statement that ends it, in one
//! replacement: before it the machine is the old one, from it on the new one, whatever happens in between.

use std::sync::Arc;
use std::time::Duration;

use peer_compute::room::database_problem;
use peer_net::ConnectionState;
use peer_proto::PeerId;
use peer_proto::code::{Code, Problem};
use peer_proto::control::{
    ApplyStatement, EndedKey, FollowedStatement, IdentityState, Revoke, Revoked, Rotate, Rotated,
};
use peer_proto::id::Name;
use peer_proto::identity::Identity;
use peer_proto::statement::Statement;
use peer_proto::unit::Timestamp;
use peer_state::database::DatabaseError;
use peer_trust::follow::{Bearer, Followed};
use peer_trust::key_file::{self, FORMER_MAX, MachineIdentity};
use peer_trust::pending;
use peer_trust::recovery;
use peer_trust::refused_keys::{self, RefusedKey};
use peer_trust::trust::ChangeError;

use super::Daemon;
use super::identity::{Slot, blocking};
use crate::node::Node;
use crate::{card, clock, statements};

/// Longest time for telling connected peers before the machine goes on under its new key.
const TELL_PATIENCE: Duration = Duration::from_secs(8);
/// Longest wait for them to come back under the new key.
const RETURN_PATIENCE: Duration = Duration::from_secs(8);
const RETURN_PAUSE: Duration = Duration::from_millis(50);

impl Daemon {
    /// Gives this machine a new key, and tells the peers. With a recovery phrase, the recovery key ends the old one.
    pub async fn rotate(self: &Arc<Self>, request: Rotate) -> Result<Rotated, Problem> {
        let mut slot = self.node.write().await;
        let Slot::Running(node) = &*slot else { return Err(slot.problem()) };
        let node = node.clone();
        let now = clock::now();
        node.requester.check_clock(now).await?;
        let recovery = request.phrase.map(|phrase| own_recovery_key(&node.identity, phrase.expose())).transpose()?;
        if node.identity.former.list().len() >= FORMER_MAX {
            let message = "several rotations have still to be told to some peers; see `peerctl identity status`, and give \
                           them up with `peerctl identity rotate --give-up`";
            return Err(Problem::new(Code::OverLimit, message));
        }
        let (next, statement) = self.successor(&node, recovery.as_ref(), now);
        let (former, current) = (node.identity.key.peer_id(), next.key.peer_id());
        // Before the key, as with every change of it.
        self.note("identity rotated", format!("{}: {former} -> {current}", statement.kind())).await?;
        self.store_next(next.clone()).await?;
        // From here on this is the machine under its new key, even if the program ends at once.
        if let Err(error) = self.begin_rotation(&next).await {
            tracing::error!(%error, "the peers to be told could not be noted; the next start does it");
        }
        let told = statements::tell_connected(&node, &statement, TELL_PATIENCE).await;
        node.shutdown().await;
        *slot = self.started(next).await;
        if let Slot::Running(node) = &*slot {
            self.await_return(node, &told).await;
        }
        drop(slot);
        let unconfirmed = self.unconfirmed().await?;
        let list = self.trust.snapshot();
        let confirmed = list.peers.values().map(|peer| peer.name.clone()).filter(|name| !unconfirmed.contains(name));
        Ok(Rotated {
            peer_id: current.to_string(),
            former: former.to_string(),
            confirmed: confirmed.collect(),
            unconfirmed,
            gateways: self.gateways.list().iter().map(|gateway| gateway.address.to_string()).collect(),
            statement: statement.to_string(),
        })
    }

    fn successor(&self, node: &Node, recovery: Option<&Identity>, now: Timestamp) -> (MachineIdentity, Statement) {
        let (own, new) = (&node.identity, Identity::generate());
        // The card is the new key's; the statement, which the file keeps, has the card inside.
        let next = own.succeed(new.clone(), Vec::new());
        let card = card::sign(&next, &self.settings, &node.network, now);
        let statement = match recovery {
            None => Statement::rotate(&own.key, &new, &card, next.epoch, now),
            Some(recovery) => Statement::replace(recovery, &new, &card, next.history.clone(), now),
        };
        (own.succeed(new, statement.as_bytes().to_vec()), statement)
    }

    async fn store_next(&self, next: MachineIdentity) -> Result<(), Problem> {
        let (directory, seal) = (self.data_dir.path().to_owned(), self.seal().clone());
        blocking(move || key_file::store(&directory, &next, seal.as_ref())).await
    }

    async fn begin_rotation(&self, identity: &MachineIdentity) -> Result<(), ChangeError> {
        let former = identity.former.list();
        if former.is_empty() {
            return Ok(());
        }
        let own = former.iter().filter_map(|former| Statement::decode(&former.statement).ok()).collect();
        self.trust.begin_rotation(identity.key.peer_id(), own, clock::now()).await
    }

    /// Goes on with a rotation that an earlier run began.
    pub(super) async fn take_up_rotation(&self, identity: &MachineIdentity) -> Result<(), ChangeError> {
        self.begin_rotation(identity).await
    }

    /// Waits until the peers that were connected are so again. A connection under the new key is what confirms it.
    async fn await_return(&self, node: &Node, told: &[PeerId]) {
        let back = |peer: &PeerId| matches!(node.network.connection_state(*peer), ConnectionState::Connected(_));
        let all = async {
            while !told.iter().all(back) {
                tokio::time::sleep(RETURN_PAUSE).await;
            }
        };
        // Those who are late are told again by the node itself.
        tokio::time::timeout(RETURN_PATIENCE, all).await.unwrap_or_default();
        for peer in told.iter().filter(|peer| back(peer)) {
            statements::confirm(self, *peer).await;
        }
    }

    /// Names of those peers who have not confirmed the newest key.
    async fn unconfirmed(&self) -> Result<Vec<Name>, Problem> {
        let missing = self.database.write(pending::missing).await.map_err(|error| database_problem(&error))?;
        let list = self.trust.snapshot();
        Ok(missing.iter().filter_map(|peer| Some(list.peers.get(peer)?.name.clone())).collect())
    }

    /// Destroys the former keys: once every peer has confirmed the present one, or on purpose before that.
    pub async fn give_up_rotation(self: &Arc<Self>) -> Result<IdentityState, Problem> {
        let key = self.node().await?.identity.key.peer_id();
        self.forget_former(key, true).await?;
        self.identity_state().await
    }

    /// As [`Daemon::give_up_rotation`], if the machine still has the key `current`.
    pub(crate) async fn forget_former(&self, current: PeerId, even_if_unconfirmed: bool) -> Result<(), Problem> {
        let slot = self.node.write().await;
        let Slot::Running(node) = &*slot else { return Err(slot.problem()) };
        if node.identity.key.peer_id() != current || node.identity.former.list().is_empty() {
            return Ok(());
        }
        let missing = self.unconfirmed().await?;
        if !missing.is_empty() && !even_if_unconfirmed {
            return Ok(());
        }
        let names: Vec<_> = missing.iter().map(Name::as_str).collect();
        let told = if names.is_empty() { "nobody".to_owned() } else { names.join(", ") };
        self.note("former keys destroyed", format!("{current}; not told: {told}")).await?;
        let emptied = MachineIdentity { former: key_file::FormerKeys::default(), ..node.identity.clone() };
        self.store_next(emptied).await?;
        node.identity.former.clear();
        let cleared = self.database.write(pending::clear).await;
        cleared.map_err(|error: DatabaseError| database_problem(&error))
    }

    /// Ends the key of a lost machine with its recovery phrase, here and at all peers.
    pub async fn revoke(self: &Arc<Self>, request: Revoke) -> Result<Revoked, Problem> {
        let node = self.node().await?;
        let now = clock::now();
        node.requester.check_clock(now).await?;
        let recovery = recovery_key(request.phrase.expose())?;
        let peer = self.lost(&node, &recovery, request.peer.as_deref())?;
        let statement = Statement::revoke(&recovery, peer, now);
        let text = statement.to_string();
        let followed = statements::take(self, &node, statement, Bearer::PhraseHolder).await?;
        let name = if let Followed::Ended { former } = followed { Some(former.name) } else { None };
        Ok(Revoked { peer_id: peer.to_string(), name, statement: text })
    }

    /// Whose key is meant: the peer that is named, or the only one with this recovery key.
    fn lost(&self, node: &Node, recovery: &Identity, named: Option<&str>) -> Result<PeerId, Problem> {
        let list = self.trust.snapshot();
        if let Some(text) = named {
            return match list.find(text) {
                Ok(found) => Ok(found.peer),
                Err(problem) => text.parse().map_err(|_| problem),
            };
        }
        let key = recovery.public_key();
        if key == node.identity.recovery_key {
            let message = "this is the recovery phrase of this machine itself; to end its present key and go on with a new \
                           one, run: peerctl identity rotate --compromised";
            return Err(Problem::new(Code::InvalidArgument, message));
        }
        let mut found = list.peers.values().filter(|peer| peer.recovery_key() == Some(key));
        match (found.next(), found.next()) {
            (Some(peer), None) => Ok(peer.peer),
            (Some(_), Some(_)) => {
                Err(Problem::new(Code::Ambiguous, "several peers have this recovery key; name one with --peer"))
            }
            (None, _) => {
                let message = "no peer of this machine has this recovery phrase; look at the words, or name the lost \
                               machine's PeerId with --peer";
                Err(Problem::new(Code::WrongRecoveryPhrase, message))
            }
        }
    }

    /// Carries out a statement that somebody has handed to the user.
    pub async fn apply_statement(self: &Arc<Self>, request: ApplyStatement) -> Result<FollowedStatement, Problem> {
        let node = self.node().await?;
        let statement: Statement = request
            .statement
            .parse()
            .map_err(|error| Problem::new(Code::InvalidArgument, format!("the statement is not valid: {error}")))?;
        let (kind, ended) = (statement.kind().to_owned(), statement.subjects().iter().map(PeerId::to_string).collect());
        let successor = statement.successor().map(|card| card.card().peer.to_string());
        let followed = statements::take(self, &node, statement, Bearer::Local).await?;
        let (name, changed) = match followed {
            Followed::Already => (None, false),
            Followed::Moved { record, .. } => (Some(record.name), true),
            Followed::Ended { former } => (Some(former.name), true),
            Followed::Refused { .. } => (None, true),
        };
        Ok(FollowedStatement { kind, ended, successor, name, changed })
    }

    /// What is told of keys beside the identity's own state.
    pub(super) async fn keys_of(&self, state: IdentityState) -> Result<IdentityState, Problem> {
        let ended = self.database.write(refused_keys::all).await;
        let mut ended = ended.map_err(|error: DatabaseError| database_problem(&error))?;
        ended.sort_by_key(|key| std::cmp::Reverse((key.at, key.peer)));
        let unconfirmed = if state.epoch == 0 { Vec::new() } else { self.unconfirmed().await? };
        Ok(IdentityState { unconfirmed, ended: ended.into_iter().filter_map(shown).collect(), ..state })
    }
}

fn shown(key: RefusedKey) -> Option<EndedKey> {
    let statement = Statement::decode(&key.statement).ok()?;
    Some(EndedKey {
        peer_id: key.peer.to_string(),
        successor: key.successor().map(|successor| successor.to_string()),
        name: key.name,
        kind: statement.kind().to_owned(),
        at: key.at,
        statement: statement.to_string(),
    })
}

fn recovery_key(phrase: &str) -> Result<Identity, Problem> {
    let phrase = zeroize::Zeroizing::new(phrase.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase());
    recovery::key_of(&phrase).map_err(|error| Problem::new(Code::WrongRecoveryPhrase, error.to_string()))
}

fn own_recovery_key(identity: &MachineIdentity, phrase: &str) -> Result<Identity, Problem> {
    let recovery = recovery_key(phrase)?;
    if recovery.public_key() == identity.recovery_key {
        return Ok(recovery);
    }
    Err(Problem::new(Code::WrongRecoveryPhrase, "these are not the words that `init` showed on this machine"))
}
