//! Statements about keys, as changes of the list.

use libp2p_identity::PeerId;
use peer_proto::statement::{Content, Statement};
use peer_proto::unit::Timestamp;
use peer_state::database::{DatabaseError, Tx};

use super::{Change, ChangeError, Trust, local};
use crate::follow::{self, Bearer, Followed};
use crate::refused_keys::{self, RefusedKey};
use crate::{detail, pending};

impl Trust {
    /// Carries a statement about a key out. `and` does, in the same transaction, what follows from it elsewhere; its text is
    /// for the audit log. A statement that is in force already changes nothing, and is no line of the log.
    pub async fn follow<T, F>(
        &self,
        statement: Statement,
        bearer: Bearer,
        now: Timestamp,
        and: F,
    ) -> Result<(Followed, T), ChangeError>
    where
        T: Default + Send + 'static,
        F: FnOnce(&Tx<'_>, &Followed) -> Result<(T, String), DatabaseError> + Send + 'static,
    {
        let known = statement.clone();
        let in_force = self.database.write(move |tx| {
            let subject = known.subjects().last().map(|key| refused_keys::find(tx, key)).transpose()?.flatten();
            Ok::<_, DatabaseError>(subject.is_some_and(|subject| subject.statement == known.as_bytes()))
        });
        if in_force.await? {
            return Ok((Followed::Already, T::default()));
        }
        let actor = match bearer {
            Bearer::Local | Bearer::PhraseHolder => "local".to_owned(),
            Bearer::Peer(peer) => peer.to_string(),
        };
        let action = match statement.content() {
            Content::Rotation(_) => "peer rotated",
            Content::Replacement(_) => "peer replaced",
            Content::Revocation(_) => "peer revoked",
        };
        self.change(Change { actor, ..local(now, action) }, move |tx, list| {
            let followed = follow::follow(tx, list, &statement, bearer, now)?;
            if let Followed::Moved { former, record } = &followed {
                pending::moved(tx, &former.peer, &record.peer)?;
            }
            let (value, more) = and(tx, &followed)?;
            let detail = detail::followed(&followed, &statement, &more);
            Ok(((followed, value), detail))
        })
        .await
    }

    /// Notes that this machine goes on under `current`: its own former keys, which these statements end, are refused, and
    /// every peer has to confirm. Does nothing if that has been noted before.
    pub async fn begin_rotation(
        &self,
        current: PeerId,
        statements: Vec<Statement>,
        now: Timestamp,
    ) -> Result<(), ChangeError> {
        if self.database.write(move |tx| pending::is_begun(tx, &current)).await? {
            return Ok(());
        }
        self.change(local(now, "peers to be told"), move |tx, list| {
            for statement in &statements {
                let successor = statement.successor().map(|card| card.card().peer);
                for subject in statement.subjects() {
                    refused_keys::put(tx, &RefusedKey::new(*subject, None, successor, statement, now))?;
                }
            }
            pending::begin(tx, &current, list.peers.keys())?;
            let names: Vec<_> = list.peers.values().map(|peer| peer.name.as_str()).collect();
            Ok(((), format!("{current}: {}", if names.is_empty() { "nobody".to_owned() } else { names.join(", ") })))
        })
        .await
    }
}
